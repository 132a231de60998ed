"""Serving a model over HTTP: OpenAI's API, saved documents, and a page to read a book with."""
