"""Matrix factorisation of RTTs: biased, of the logarithm, by least squares; and DMFSGD."""

import numpy as np

from ping_llm.estimators.pairs import PredictPairs, Training, between_nodes, runs

MF_RANK = 16
# For each entry of a node, so that nodes of few pairs keep something of their factors.
MF_REGULARISATION = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
MF_BIAS_REGULARISATION = 0.001
MF_SWEEPS = 20
MF_HELD_OUT = 0.05

DMF_RANK = 10
DMF_STEP = 0.1
DMF_REGULARISATION = 0.01
DMF_EPOCHS = 60
DMF_BATCH = 1024


class _ByRow:
    """The entries of a sparse matrix by row, rows of equally many entries solved together."""

    def __init__(self, row: np.ndarray):
        order = np.argsort(row, kind="stable")
        starts, counts = runs(row[order])
        rows = row[order][starts]
        self._groups: list[tuple[np.ndarray, np.ndarray]] = []
        for count in np.unique(counts):
            chosen = counts == count
            entries = order[starts[chosen][:, None] + np.arange(count)]  # [rows, count]
            self._groups.append((rows[chosen], entries))

    def ridge(
        self, out: np.ndarray, features: np.ndarray, target: np.ndarray, penalty: np.ndarray
    ) -> None:
        """Sets rows of `out` to the ridge regression of their entries' target on their features.

        Args:
            out: Coefficients of each row [rows, F].
            features: Features of each entry [n, F].
            target: Value of each entry [n].
            penalty: Of the square of each coefficient, for each entry of the row [F].
        """
        for rows, entries in self._groups:
            step = max(1, 4_000_000 // (entries.shape[1] * features.shape[1]))
            for i in range(0, len(rows), step):
                chosen = entries[i : i + step]
                x, y = features[chosen], target[chosen, None]  # [m, count, F], [m, count, 1]
                x_t = x.swapaxes(1, 2)
                ridge = np.diag(penalty * entries.shape[1])
                solved = np.linalg.solve(x_t @ x + ridge, x_t @ y)
                out[rows[i : i + step]] = solved[..., 0]


def _factorise(
    i: np.ndarray, j: np.ndarray, y: np.ndarray, n_nodes: int, regularisation: float
) -> PredictPairs:
    """Returns the fit of `y` = mean + bias_i + bias_j + u_i . v_j, by alternating ridge."""
    mean = y.mean()
    penalty = np.full(MF_RANK + 1, regularisation)
    penalty[-1] = MF_BIAS_REGULARISATION
    sides = np.zeros((2, n_nodes, MF_RANK + 1))  # as one end, as the other; the bias comes last
    sides[1, :, :-1] = np.random.default_rng(0).normal(0, 0.1, (n_nodes, MF_RANK))
    by_row = (_ByRow(i), _ByRow(j))
    ends = (i, j)
    for _ in range(MF_SWEEPS):
        for side in (0, 1):
            other = sides[1 - side][ends[1 - side]]
            features = np.c_[other[:, :-1], np.ones(len(y))]
            by_row[side].ridge(sides[side], features, y - mean - other[:, -1], penalty)
    one, two = sides

    def predict(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        products = np.einsum("nr,nr->n", one[a, :-1], two[b, :-1])
        return mean + one[a, -1] + two[b, -1] + products

    return predict


@between_nodes
def fit_biased_mf(train: Training) -> PredictPairs:
    """Returns the fit of log RTT = mean + biases + product of factors, rank 16.

    The penalty is chosen on 5 % of the training pairs; the fit then has all of them.
    """
    i, j, rtt = train.directed
    y, n = np.log(rtt), len(train.nodes)
    # Both directions of a pair are held out together.
    key = np.minimum(i, j) * n + np.maximum(i, j)
    pairs, number = np.unique(key, return_inverse=True)
    held = (np.random.default_rng(0).random(len(pairs)) < MF_HELD_OUT)[number]
    errors = {}
    if held.any() and not held.all():
        for regularisation in MF_REGULARISATION:
            predict = _factorise(i[~held], j[~held], y[~held], n, regularisation)
            errors[regularisation] = np.abs(predict(i[held], j[held]) - y[held]).mean()
    best = min(errors, key=errors.__getitem__) if errors else MF_REGULARISATION[-1]
    predict = _factorise(i, j, y, n, best)
    low, high = y.min(), y.max()

    def predict_rtt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = (predict(a, b) + predict(b, a)) / 2
        return np.exp(np.clip(both, low, high))

    return predict_rtt


@between_nodes
def fit_dmfsgd(train: Training) -> PredictPairs:
    """Returns the fit of RTT = product of non-negative-born factors, rank 10, in absolute error.

    Distributed matrix factorisation by stochastic gradient descent (Liao, Du, Geurts and Leduc,
    2013), in mini-batches: within one, a node takes the mean of its gradients.
    """
    i, j, rtt = train.directed
    n, rng = len(train.nodes), np.random.default_rng(0)
    scale = np.median(rtt)
    y = rtt / scale
    one, two = rng.uniform(0, 1, (2, n, DMF_RANK))
    steps = DMF_EPOCHS * -(-len(y) // DMF_BATCH)
    done = 0
    for _ in range(DMF_EPOCHS):
        order = rng.permutation(len(y))
        for start in range(0, len(y), DMF_BATCH):
            chosen = order[start : start + DMF_BATCH]
            a, b = i[chosen], j[chosen]
            u, v = one[a], two[b]
            sign = np.sign(np.einsum("nr,nr->n", u, v) - y[chosen])[:, None]
            step = DMF_STEP * (1 - done / steps)
            for side, nodes, own, other in ((one, a, u, v), (two, b, v, u)):
                times = np.bincount(nodes, minlength=n)[nodes][:, None]
                move = step * (sign * other + DMF_REGULARISATION * own) / times
                np.subtract.at(side, nodes, move)
            done += 1
    low, high = rtt.min(), rtt.max()

    def predict_rtt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        products = np.einsum("nr,nr->n", one[a], two[b]) + np.einsum("nr,nr->n", one[b], two[a])
        return np.clip(products / 2 * scale, low, high)

    return predict_rtt
