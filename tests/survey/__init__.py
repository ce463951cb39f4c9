"""What of diffusers and transformers can be protected, mechanism by mechanism, found by running it: the tables of docs/hosts.md."""
