"""An OpenAI-compatible server on top of Transformers' own."""
