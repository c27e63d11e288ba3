"""Training state as files: layout, upload, restore, retention."""
