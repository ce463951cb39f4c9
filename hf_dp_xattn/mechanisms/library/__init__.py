"""`library`: each unit is answered by a text of a public library."""
