"""Hosts that are served by text: what is released is public text, and the host runs on it as on any other."""
