"""The small model of the hybrid filter: documents to grades 0-9, and to one score (see data/filter/quality.py).

Ridge regression on TF-IDF of 1-5-grams gives a first grade of each dimension. Boosted trees on these (out of fold), a
vector and a few measures of form give the tags; a further run of trees, which sees similarity to curated documents too,
the score. The report (arXiv 2512.06266, section 2) names no models: our choice.

Shapes: N documents, F grams, E width of a vector, G dimensions graded, S curated documents.
"""
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict

from common import UserError
from data.filter import dedup

# ---------------------------------------------------------------------------------------------------------------------
# Features

LONGEST_GRAM, BUCKETS = 5, 1 << 22  # words and signs of a gram; its hash's range
N_FORM = 10


def excerpt(text: str, n: int) -> str:
    """The text, or five pieces of it, evenly spaced, of n characters together."""
    if len(text) <= n:
        return text
    starts = np.linspace(0, len(text) - n // 5, 5).astype(int)
    return "\n".join(text[s:s + n // 5] for s in starts)


def grams_and_form(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of all 1-5-grams (int64), and measures of form (N_FORM,) between about 0 and 1."""
    found = dedup.tokens(text)
    h = dedup.hashes(found)
    grams = [dedup.runs(h, n) for n in range(1, LONGEST_GRAM + 1)]
    sentences = [{w for w in dedup.tokens(s) if w[0].isalnum()} for s in re.split(r"[.!?\n]", text)]
    sentences = [s for s in sentences if s] or [set()]
    taken_up = [len(a & b) / len(b) for a, b in zip(sentences, sentences[1:])] or [0]
    n, half, fives = max(1, len(h)), len(h) // 2, grams[-1]
    form = [np.log1p(n) / 10,
            sum(t.isalpha() for t in found) / n,
            sum(t.isdigit() for t in found) / n,
            text.count("\n") / n,
            len(np.unique(h)) / n,
            len(np.unique(fives)) / max(1, len(fives)),
            # cohesion: what was said comes up again, in the second half, the next sentence, the last one
            np.isin(h[half:], h[:half]).mean() if half else 0,
            np.mean(taken_up),
            np.mean([t > 0 for t in taken_up]),
            len(sentences[-1] & set().union(*sentences[:-1])) / max(1, len(sentences[-1]))]
    return (np.concatenate(grams) % np.uint64(BUCKETS)).astype(np.int64), np.array(form, np.float32)


def counts(texts: list[str], column_of: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
    """How often each known gram occurs (N, F), and the measures of form (N, N_FORM)."""
    columns, values, ends, forms = [], [], [0], []
    for text in texts:
        grams, form = grams_and_form(text)
        column = column_of[grams]
        column, n = np.unique(column[column >= 0], return_counts=True)
        columns.append(column)
        values.append(n)
        ends.append(ends[-1] + len(column))
        forms.append(form)
    n_columns = int(column_of.max()) + 1
    matrix = sparse.csr_matrix((np.concatenate(values).astype(np.float32), np.concatenate(columns), ends),
                               (len(texts), n_columns))
    return matrix, np.stack(forms)


def tf_idf(n: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    """(1 + log n) * idf in rows of length 1."""
    x = n.copy()
    x.data = (1 + np.log(x.data)) * idf[x.indices]
    norm = np.sqrt(np.asarray(x.multiply(x).sum(1)))
    return sparse.csr_matrix(x.multiply(1 / np.maximum(norm, 1e-9)), dtype=np.float32)


def bm25(n: sparse.csr_matrix, idf: np.ndarray, k: float = 1.2, b: float = 0.75) -> sparse.csr_matrix:
    """BM25 weight of each gram in each curated document (S, F); Robertson and Zaragoza 2009."""
    length = np.asarray(n.sum(1))
    x = n.tocoo()
    damped = k * (1 - b + b * length[x.row, 0] / max(1e-9, length.mean()))
    return sparse.csr_matrix((idf[x.col] * x.data * (k + 1) / (x.data + damped), (x.row, x.col)), n.shape)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def nearest(similarity: np.ndarray, n: int = 5) -> np.ndarray:
    """(N, S) -> (N,): mean of the n largest."""
    n = min(n, similarity.shape[1])
    return np.partition(similarity, -n, axis=1)[:, -n:].mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# The small model

@dataclass
class Filter:
    """What fit() learns, in arrays: a file of it holds no code. The trees are grown again, alike, from their table."""
    dimensions: list            # names of the G dimensions
    column_of: np.ndarray       # (BUCKETS,) int32: column of a gram, -1 for one that is not used
    idf: np.ndarray             # (F,)
    components: np.ndarray      # (E, F): TF-IDF -> vector; (0, F) where `embed` makes the vectors
    lexical: sparse.csr_matrix  # (S, F): BM25 weights of the curated documents
    vectors: np.ndarray         # (S, E): their vectors, of length 1
    ridge: np.ndarray = None    # (G, F + 1): grades from TF-IDF; the last column is the intercept
    inputs: np.ndarray = None   # (N, G + E + N_FORM + 2) of the labelled documents: what trees() learn from …
    grades: np.ndarray = None   # (N, G) … and what they learn
    embed: Callable | None = None

    def features(self, texts: list[str]) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray, np.ndarray]:
        """Counts (N, F), TF-IDF (N, F), vectors (N, E) of length 1, and measures of form (N, N_FORM)."""
        n, form = counts(texts, self.column_of)
        x = tf_idf(n, self.idf)
        return n, x, unit(np.asarray(self.embed(texts), np.float32) if self.embed else x @ self.components.T), form

    def retrieval(self, n: sparse.csr_matrix, vectors: np.ndarray, itself: np.ndarray | None = None) -> np.ndarray:
        """(N, 2): lexical and vector similarity to the nearest curated documents.

        Lexical: the share of the document's own weight that BM25 finds in a curated one.
        itself (N,): the curated document that each document is (-1: none), which must not count.
        """
        query = n.copy()
        query.data[:] = 1
        lexical = (query @ self.lexical.T).toarray() / np.maximum(query @ self.idf, 1e-9)[:, None]
        vector = vectors @ self.vectors.T
        if itself is not None:
            rows = np.flatnonzero(itself >= 0)
            lexical[rows, itself[rows]] = vector[rows, itself[rows]] = 0
        return np.stack([nearest(lexical), nearest(vector)], 1)

    @functools.cached_property
    def trees(self) -> list[HistGradientBoostingRegressor]:
        """One for each dimension, which do not see retrieval, and one for the score, which does."""
        x, overall = self.inputs, overall_grade(self.grades, self.dimensions)
        kinds = [(x[:, :-2], grade) for grade in self.grades.T] + [(x, overall)]
        leaf = max(2, min(20, len(x) // 20))  # documents of a leaf: a small labelled set must split too
        return [HistGradientBoostingRegressor(min_samples_leaf=leaf, random_state=0).fit(inputs, grade)
                for inputs, grade in kinds]

    def scores(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tags (N, G) and score (N,), both 0-9, and retrieval (N, 2)."""
        n, x, vectors, form = self.features(texts)
        found = self.retrieval(n, vectors)
        inputs = np.hstack([x @ self.ridge[:, :-1].T + self.ridge[:, -1], vectors, form, found])
        *tags, score = [tree.predict(inputs[:, :tree.n_features_in_]).clip(0, 9) for tree in self.trees]
        return np.stack(tags, 1), score, found

    def save(self, path: Path) -> None:
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        lexical = {f"lexical_{k}": getattr(self.lexical, k) for k in ("data", "indices", "indptr", "shape")}
        np.savez(path.with_suffix(".tmp.npz"), dimensions=np.array(self.dimensions), **arrays, **lexical)
        path.with_suffix(".tmp.npz").replace(path)

    @classmethod
    def load(cls, path: Path, embed: Callable | None = None) -> "Filter":
        with np.load(path, allow_pickle=False) as f:
            parts = {k: f[k] for k in f.files}
        lexical = sparse.csr_matrix(tuple(parts.pop(f"lexical_{k}") for k in ("data", "indices", "indptr")),
                                    tuple(parts.pop("lexical_shape")))
        return cls(parts.pop("dimensions").tolist(), lexical=lexical, embed=embed, **parts)


def overall_grade(grades: np.ndarray, dimensions: list[str]) -> np.ndarray:
    """(N,): the dimension "overall" where there is one, else the mean of all."""
    return grades[:, dimensions.index("overall")] if "overall" in dimensions else grades.mean(1)


def fit(texts: list[str], grades: np.ndarray, dimensions: list[str], curated: list[str] | None = None,
        embed: Callable | None = None, n_curated: int = 200) -> Filter:
    """Distils the small model from N labelled documents: grades (N, G), 0-9.

    curated: documents that retrieval compares with; None: the labelled ones with the best grades. Raises UserError
    where there is nothing to learn: fewer than 20 documents, or one grade throughout.
    """
    grades, dimensions = np.asarray(grades, np.float32), list(dimensions)
    overall = overall_grade(grades, dimensions)
    if len(texts) < 20:
        raise UserError(f"{len(texts)} labelled documents are too few to learn from; label some hundreds")
    if np.ptp(overall) == 0:
        raise UserError(f"all {len(texts)} labelled documents have the same overall grade, {overall[0]:g}: there is "
                        "nothing to tell apart; label good and bad ones")
    used = np.zeros(BUCKETS, np.int32)  # documents that hold each gram
    for text in texts:
        used[np.unique(grams_and_form(text)[0])] += 1
    column_of = np.where(used >= 2, np.cumsum(used >= 2) - 1, -1).astype(np.int32)
    idf = np.log(1 + len(texts) / used[used >= 2]).astype(np.float32)
    if len(idf) < 2:
        raise UserError("the labelled documents have no words in common: are they text?")
    n, form = counts(texts, column_of)
    x = tf_idf(n, idf)
    if embed:
        components, vectors = np.zeros((0, len(idf)), np.float32), np.asarray(embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise UserError(f"quality.embed gave an array of shape {vectors.shape} for {len(texts)} texts")
    else:
        svd = TruncatedSVD(min(64, len(texts) - 1, len(idf) - 1), random_state=0).fit(x)
        components = svd.components_.astype(np.float32)
        vectors = x @ components.T
    vectors = unit(vectors)

    itself = np.full(len(texts), -1)
    if not curated:
        best = np.argsort(-overall, kind="stable")[:min(n_curated, len(texts) // 4)]
        curated, itself[best] = [texts[i] for i in best], np.arange(len(best))
    filter = Filter(dimensions, column_of, idf, components, lexical=None, vectors=None, embed=embed, grades=grades)
    n_curated, _, filter.vectors, _ = filter.features(curated)
    filter.lexical = bm25(n_curated, idf)
    ridge = RidgeCV(np.logspace(-2, 1, 7), alpha_per_target=True).fit(x, grades)
    filter.ridge = np.hstack([ridge.coef_.reshape(len(dimensions), -1), ridge.intercept_.reshape(-1, 1)])
    unseen = cross_val_predict(Ridge(ridge.alpha_), x, grades, cv=KFold(5, shuffle=True, random_state=0))
    found = filter.retrieval(n, vectors, itself)
    filter.inputs = np.hstack([unseen.reshape(len(texts), -1), vectors, form, found]).astype(np.float32)
    return filter
