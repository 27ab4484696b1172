"""Fast tokenising of documents of any length."""
