"""Everything that is fitted to PUBLIC contexts: geometry, sketch basis, plans."""
