"""The small model of the hybrid filter: documents to grades 0-9, and to one score.

Ridge regression on TF-IDF of 1-5-grams gives a first grade of each dimension. Boosted trees on
these (out of fold), a vector and a few measures of form give the tags; a further run of trees,
which sees similarity to curated documents too, the score. See data/filter/quality.py. The report
(arXiv 2512.06266, section 2) names no models: our choice.

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

LONGEST_GRAM = 5    # words and signs of a gram
BUCKETS = 1 << 22   # range of a gram's hash
N_FORM = 10         # measures of form
N_CURATED = 200     # curated documents that retrieval compares with, at most
N_NEAREST = 5       # of them that count for a document

# --------------------------------------------------------------------------------------------------
# Features

def excerpt(text: str, n: int) -> str:
    """The text, or five pieces of it, evenly spaced, of n characters together."""
    if len(text) <= n:
        return text
    starts = np.linspace(0, len(text) - n // 5, 5).astype(int)
    return "\n".join(text[start:start + n // 5] for start in starts)


def grams_and_form(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of all 1-5-grams (int64), and measures of form (N_FORM,), between about 0 and 1."""
    tokens = dedup.tokens(text)
    hashes = dedup.hashes(tokens)
    grams = [dedup.runs(hashes, n) for n in range(1, LONGEST_GRAM + 1)]
    longest = grams[-1]
    n = max(1, len(hashes))
    n_words = sum(token.isalpha() for token in tokens)
    n_numbers = sum(token.isdigit() for token in tokens)
    form = [
        np.log1p(n) / 10,
        n_words / n,
        n_numbers / n,
        text.count("\n") / n,
        len(np.unique(hashes)) / n,
        len(np.unique(longest)) / max(1, len(longest)),
        *_cohesion(text, hashes),
    ]
    buckets = (np.concatenate(grams) % np.uint64(BUCKETS)).astype(np.int64)
    return buckets, np.array(form, np.float32)


def _cohesion(text: str, hashes: np.ndarray) -> list[float]:
    """Shares of what was written before that comes up again: four measures of form.

    In the second half; in the next sentence, on average and at all; in the last sentence.
    """
    half = len(hashes) // 2
    second_half = np.isin(hashes[half:], hashes[:half]).mean() if half else 0
    sentences = []  # the words of each
    for sentence in re.split(r"[.!?\n]", text):
        words = {token for token in dedup.tokens(sentence) if token[0].isalnum()}
        if words:
            sentences.append(words)
    if not sentences:
        return [second_half, 0, 0, 0]
    overlaps = [len(words & following) / len(following)
                for words, following in zip(sentences, sentences[1:])]
    if not overlaps:
        overlaps = [0]
    before_last = set().union(*sentences[:-1])
    return [
        second_half,
        np.mean(overlaps),
        np.mean([overlap > 0 for overlap in overlaps]),
        len(sentences[-1] & before_last) / len(sentences[-1]),
    ]


def counts(texts: list[str], column_of: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
    """How often each known gram occurs (N, F), and the measures of form (N, N_FORM)."""
    columns, values, forms = [], [], []
    ends = [0]
    for text in texts:
        grams, form = grams_and_form(text)
        column = column_of[grams]
        column, n = np.unique(column[column >= 0], return_counts=True)
        columns.append(column)
        values.append(n)
        ends.append(ends[-1] + len(column))
        forms.append(form)
    values = np.concatenate(values).astype(np.float32)
    shape = len(texts), int(column_of.max()) + 1
    return sparse.csr_matrix((values, np.concatenate(columns), ends), shape), np.stack(forms)


def tf_idf(n: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    """(1 + log n) * idf in rows of length 1."""
    x = n.copy()
    x.data = (1 + np.log(x.data)) * idf[x.indices]
    norm = np.sqrt(np.asarray(x.multiply(x).sum(1)))
    return sparse.csr_matrix(x.multiply(1 / np.maximum(norm, 1e-9)), dtype=np.float32)


def bm25(n: sparse.csr_matrix, idf: np.ndarray, k: float = 1.2,
         b: float = 0.75) -> sparse.csr_matrix:
    """BM25 weight of each gram in each curated document (S, F); Robertson and Zaragoza 2009."""
    length = np.asarray(n.sum(1))
    x = n.tocoo()
    damping = k * (1 - b + b * length[x.row, 0] / max(1e-9, length.mean()))
    weights = idf[x.col] * x.data * (k + 1) / (x.data + damping)
    return sparse.csr_matrix((weights, (x.row, x.col)), n.shape)


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors, rows of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def nearest(similarity: np.ndarray) -> np.ndarray:
    """(N, S) -> (N,): mean of the N_NEAREST largest."""
    n = min(N_NEAREST, similarity.shape[1])
    return np.partition(similarity, -n, axis=1)[:, -n:].mean(1)


# --------------------------------------------------------------------------------------------------
# The small model

@dataclass
class Filter:
    """What fit() learns, in arrays: a file of it holds no code.

    The trees are grown again, alike, from their table.
    """
    dimensions: list            # names of the G dimensions
    column_of: np.ndarray       # (BUCKETS,) int32: column of a gram, -1 for one that is not used
    idf: np.ndarray             # (F,)
    components: np.ndarray      # (E, F): TF-IDF -> vector; (0, F) where `embed` makes the vectors
    lexical: sparse.csr_matrix  # (S, F): BM25 weights of the curated documents
    vectors: np.ndarray         # (S, E): their vectors, of length 1
    ridge: np.ndarray = None    # (G, F + 1): TF-IDF -> grades; the last column is the intercept
    inputs: np.ndarray = None   # (N, G + E + N_FORM + 2): what trees() learn from, of labelled …
    grades: np.ndarray = None   # (N, G) … documents, and what they learn
    embed: Callable | None = None  # texts -> (N, E) vectors

    def features(self, texts: list[str]
                 ) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray, np.ndarray]:
        """Counts (N, F), TF-IDF (N, F), vectors (N, E) of length 1, and form (N, N_FORM)."""
        n, form = counts(texts, self.column_of)
        x = tf_idf(n, self.idf)
        if self.embed:
            vectors = np.asarray(self.embed(texts), np.float32)
        else:
            vectors = x @ self.components.T
        return n, x, unit(vectors), form

    def retrieval(self, n: sparse.csr_matrix, vectors: np.ndarray,
                  itself: np.ndarray | None = None) -> np.ndarray:
        """(N, 2): lexical and vector similarity to the nearest curated documents.

        n (N, F): counts. Lexical is the share of the document's own weight that BM25 finds in a
        curated one. itself (N,): the curated document that each document is (-1: none), which must
        not count.
        """
        query = n.copy()
        query.data[:] = 1
        own_weight = np.maximum(query @ self.idf, 1e-9)
        lexical = (query @ self.lexical.T).toarray() / own_weight[:, None]
        vector = vectors @ self.vectors.T
        if itself is not None:
            rows = np.flatnonzero(itself >= 0)
            lexical[rows, itself[rows]] = 0
            vector[rows, itself[rows]] = 0
        return np.stack([nearest(lexical), nearest(vector)], 1)

    @functools.cached_property
    def trees(self) -> list[HistGradientBoostingRegressor]:
        """One for each dimension, which do not see retrieval, and one for the score, which does."""
        without_retrieval = self.inputs[:, :-2]
        tasks = [(without_retrieval, grade) for grade in self.grades.T]
        tasks.append((self.inputs, overall_grade(self.grades, self.dimensions)))
        # documents of a leaf: a small labelled set must split too
        leaf = max(2, min(20, len(self.inputs) // 20))
        trees = []
        for inputs, grade in tasks:
            tree = HistGradientBoostingRegressor(min_samples_leaf=leaf, random_state=0)
            trees.append(tree.fit(inputs, grade))
        return trees

    def scores(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tags (N, G) and score (N,), both 0-9, and retrieval (N, 2)."""
        n, x, vectors, form = self.features(texts)
        retrieval = self.retrieval(n, vectors)
        first_grades = x @ self.ridge[:, :-1].T + self.ridge[:, -1]
        inputs = np.hstack([first_grades, vectors, form, retrieval])
        predictions = []
        for tree in self.trees:
            predictions.append(tree.predict(inputs[:, :tree.n_features_in_]).clip(0, 9))
        *tags, score = predictions
        return np.stack(tags, 1), score, retrieval

    def save(self, path: Path) -> None:
        """Writes the arrays as .npz, all or nothing."""
        arrays = {name: value for name, value in vars(self).items()
                  if isinstance(value, np.ndarray)}
        for part in ("data", "indices", "indptr", "shape"):
            arrays[f"lexical_{part}"] = getattr(self.lexical, part)
        aside = path.with_suffix(".tmp.npz")
        np.savez(aside, dimensions=np.array(self.dimensions), **arrays)
        aside.replace(path)

    @classmethod
    def load(cls, path: Path, embed: Callable | None = None) -> "Filter":
        """Reads what save() wrote."""
        with np.load(path, allow_pickle=False) as f:
            arrays = {name: f[name] for name in f.files}
        parts = tuple(arrays.pop(f"lexical_{part}") for part in ("data", "indices", "indptr"))
        lexical = sparse.csr_matrix(parts, tuple(arrays.pop("lexical_shape")))
        dimensions = arrays.pop("dimensions").tolist()
        return cls(dimensions, lexical=lexical, embed=embed, **arrays)


def overall_grade(grades: np.ndarray, dimensions: list[str]) -> np.ndarray:
    """(N,): the dimension "overall" where there is one, else the mean of all."""
    if "overall" in dimensions:
        return grades[:, dimensions.index("overall")]
    return grades.mean(1)


def fit(texts: list[str], grades: np.ndarray, dimensions: list[str],
        curated: list[str] | None = None, embed: Callable | None = None) -> Filter:
    """Distils the small model from N labelled documents: grades (N, G), 0-9.

    curated: documents that retrieval compares with; None: the labelled ones with the best grades.
    Raises UserError where there is nothing to learn: fewer than 20 documents, or one grade
    throughout.
    """
    grades, dimensions = np.asarray(grades, np.float32), list(dimensions)
    if len(texts) < 20:
        raise UserError(f"{len(texts)} labelled documents are too few to learn from; label some "
                        "hundreds")
    overall = overall_grade(grades, dimensions)
    if np.ptp(overall) == 0:
        raise UserError(f"all {len(texts)} labelled documents have the same overall grade, "
                        f"{overall[0]:g}: there is nothing to tell apart; label good and bad ones")
    column_of, idf = _choose_grams(texts)
    n, form = counts(texts, column_of)
    x = tf_idf(n, idf)
    components, vectors = _learn_vectors(texts, x, embed)
    itself = np.full(len(texts), -1)
    if not curated:
        best = np.argsort(-overall, kind="stable")[:min(N_CURATED, len(texts) // 4)]
        curated = [texts[i] for i in best]
        itself[best] = np.arange(len(best))

    model = Filter(dimensions, column_of, idf, components, lexical=None, vectors=None,
                   embed=embed, grades=grades)
    curated_counts, _, model.vectors, _ = model.features(curated)
    model.lexical = bm25(curated_counts, idf)
    ridge = RidgeCV(np.logspace(-2, 1, 7), alpha_per_target=True).fit(x, grades)
    slopes = ridge.coef_.reshape(len(dimensions), -1)
    model.ridge = np.hstack([slopes, ridge.intercept_.reshape(-1, 1)])
    folds = KFold(5, shuffle=True, random_state=0)
    out_of_fold = cross_val_predict(Ridge(ridge.alpha_), x, grades, cv=folds)
    retrieval = model.retrieval(n, vectors, itself)
    inputs = np.hstack([out_of_fold.reshape(len(texts), -1), vectors, form, retrieval])
    model.inputs = inputs.astype(np.float32)
    return model


def _choose_grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """column_of (BUCKETS,) and idf (F,) of the grams that two documents or more hold."""
    n_documents = np.zeros(BUCKETS, np.int32)  # that hold each gram
    for text in texts:
        grams, _ = grams_and_form(text)
        n_documents[np.unique(grams)] += 1
    is_used = n_documents >= 2
    column_of = np.where(is_used, np.cumsum(is_used) - 1, -1).astype(np.int32)
    idf = np.log(1 + len(texts) / n_documents[is_used]).astype(np.float32)
    if len(idf) < 2:
        raise UserError("the labelled documents have no words in common: are they text?")
    return column_of, idf


def _learn_vectors(texts: list[str], x: sparse.csr_matrix,
                   embed: Callable | None) -> tuple[np.ndarray, np.ndarray]:
    """components (E, F) and vectors (N, E) of length 1: `embed`'s, or an SVD of TF-IDF x (N, F)."""
    n_texts, n_grams = x.shape
    if embed:
        components = np.zeros((0, n_grams), np.float32)
        vectors = np.asarray(embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != n_texts:
            raise UserError(f"quality.embed gave an array of shape {vectors.shape} for {n_texts} "
                            "texts")
    else:
        svd = TruncatedSVD(min(64, n_texts - 1, n_grams - 1), random_state=0).fit(x)
        components = svd.components_.astype(np.float32)
        vectors = x @ components.T
    return components, unit(vectors)
