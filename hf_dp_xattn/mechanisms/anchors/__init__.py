"""`anchors`: one release in context space that serves every layer and head; decoders that turn it into a few public-looking rows."""
