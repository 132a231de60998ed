"""Data: documents, the embedded tokenizer, generated tasks, and mixes of them that resume exactly."""

from sala.data.mix import Batch, Mix
from sala.data.sources import Document, concatenate, library_documents
from sala.data.tasks import TASKS, Question, RetrievalDocument, retrieval_document
from sala.data.tokenizer import Vocabulary, encode_documents, load_tokenizer, train_tokenizer, vocabulary

__all__ = [
    "TASKS",
    "Batch",
    "Document",
    "Mix",
    "Question",
    "RetrievalDocument",
    "Vocabulary",
    "concatenate",
    "encode_documents",
    "library_documents",
    "load_tokenizer",
    "retrieval_document",
    "train_tokenizer",
    "vocabulary",
]
