import numpy as np

from ping_llm.serve.scaling import classical_scaling


def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def test_points_in_a_plane_are_found_again_but_for_a_turn():
    points = np.random.default_rng(0).normal(size=(12, 2)) * [40, 10]
    landmarks, others = points[:5], points[5:]
    placed = classical_scaling(distances(landmarks, landmarks), distances(others, landmarks))
    np.testing.assert_allclose(distances(placed, placed), distances(points, points), atol=1e-9)
    alone = classical_scaling(distances(points, points))
    np.testing.assert_allclose(distances(alone, alone), distances(points, points), atol=1e-9)


def test_points_on_a_line_stay_on_it_and_one_alone_is_the_origin():
    line = np.array([[0.0, 0], [3, 0], [7, 0]])
    placed = classical_scaling(distances(line, line))
    np.testing.assert_allclose(distances(placed, placed), distances(line, line), atol=1e-6)
    assert classical_scaling(np.zeros((1, 1))).tolist() == [[0, 0]]
    assert np.isfinite(classical_scaling(np.zeros((3, 3)), np.zeros((2, 3)))).all()
