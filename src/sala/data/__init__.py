"""Data: documents, the embedded tokenizer, generated tasks, tokenised shards, and mixes of them that resume exactly."""

from sala.data.encode import Summary, write_shards
from sala.data.files import Files, Record, find_files, open_dataset, read_dataset, read_files
from sala.data.mix import Batch, Mix
from sala.data.shards import Shards, tokenizer_hash
from sala.data.sources import Document, concatenate, library_documents
from sala.data.stream import NO_LABEL, PackedBatch, Source, Stream
from sala.data.tasks import TASKS, Question, RetrievalDocument, retrieval_document
from sala.data.tokenizer import Vocabulary, encode_documents, encode_stream, load_tokenizer, train_tokenizer, vocabulary

__all__ = [
    "NO_LABEL",
    "TASKS",
    "Batch",
    "Document",
    "Files",
    "Mix",
    "PackedBatch",
    "Question",
    "Record",
    "RetrievalDocument",
    "Shards",
    "Source",
    "Stream",
    "Summary",
    "Vocabulary",
    "concatenate",
    "encode_documents",
    "encode_stream",
    "find_files",
    "library_documents",
    "load_tokenizer",
    "open_dataset",
    "read_dataset",
    "read_files",
    "retrieval_document",
    "tokenizer_hash",
    "train_tokenizer",
    "vocabulary",
    "write_shards",
]
