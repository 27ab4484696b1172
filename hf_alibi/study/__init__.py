"""The study: the same decoder, text and seeds with each position method, and tables and plots of what was found."""
