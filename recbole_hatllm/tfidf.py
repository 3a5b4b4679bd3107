"""Titles as TF-IDF vectors of their words and pairs of words, and how near an item's title is to those of a history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from recbole_hatllm.errors import DataError


def title_vectors(titles: Sequence[str], min_df: int, among: Sequence[str] | None = None) -> scipy.sparse.csr_matrix:
    """[n_items, terms] float64: scikit-learn's TF-IDF of each title, (1 + ln count) (1 + ln((1 + n) / (1 + titles with the term)))
    over the length of that vector, n titles in all.

    A term is a word of two or more letters or digits, or two of them side by side. A title without any is a row of zeros.

    Args:
        titles: by internal id, padding's (empty) first. min_df: a term counts if at least so many titles have it.
        among: the titles, padding's first, in which terms are counted; by default these.

    Raises:
        DataError: no title has a term.
    """
    try:
        counted = (titles if among is None else among)[1:]
        terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min_df).fit(counted)
    except ValueError as error:
        raise DataError(
            f"No word occurs in {min_df} of the {len(counted)} titles: lower min_df, or take a model without titles."
        ) from error
    return terms.transform(titles).tocsr()


def title_cosine(history: scipy.sparse.csr_matrix, vectors: scipy.sparse.csr_matrix) -> np.ndarray:
    """[B, n_items] float64: cosine of each item's vector with the history's sum of vectors; 0 where either is zero.

    Args:
        history: [B, n_items], the weight of each item. vectors: [n_items, terms] of length 1 or 0.
    """
    return (normalize(history @ vectors) @ vectors.T).toarray()
