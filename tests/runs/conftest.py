"""The tiny random teachers of the conversion's tests."""

from convert.conftest import any_family, family, teacher_of

__all__ = ["any_family", "family", "teacher_of"]
