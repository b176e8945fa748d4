from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from quantempo.quality import PSNR_CEILING_DB, Judge, frechet_distance, psnr_db, sqnr_db, ssim


def pictures(seed: int, count: int = 3, size: int = 24, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((count, size, size, channels)).astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    reference = np.full((2, 4, 4, 1), 0.5, np.float32)
    images = reference + np.array([0.1, 0.01], np.float32).reshape(2, 1, 1, 1)
    assert psnr_db(images, reference) == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_clips_to_what_a_screen_shows() -> None:
    reference, images = np.ones((1, 4, 4, 1), np.float32), np.full((1, 4, 4, 1), 7.0, np.float32)
    assert psnr_db(images, reference) == pytest.approx([PSNR_CEILING_DB])


def test_sqnr_of_a_known_error() -> None:
    reference = np.full(100, 2.0, np.float32)
    assert sqnr_db(reference + np.float32(0.02), reference) == pytest.approx(40.0, abs=1e-4)
    assert sqnr_db(reference, reference) == PSNR_CEILING_DB


def test_ssim_agrees_with_the_window_sums_written_out() -> None:
    x, y = pictures(0, 1)[0, :, :, 0].astype(np.float64), pictures(1, 1)[0, :, :, 0].astype(np.float64)
    reach = 5
    grid = np.arange(-reach, reach + 1)
    line = np.exp(-(grid**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, reach, mode="symmetric")
        out = np.zeros_like(values)
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                out[row, column] = (window * padded[row : row + 11, column : column + 11]).sum()
        return out

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    wanted = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    found = ssim(pictures(0, 1), pictures(1, 1))
    assert found == pytest.approx([wanted], rel=1e-6)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    reference = pictures(0)
    assert ssim(reference, reference) == pytest.approx([1.0] * 3)
    light, heavy = (ssim(reference + s * (pictures(1) - 0.5), reference) for s in (0.1, 0.5))
    assert (heavy < light).all()
    assert (light < 1).all()


def test_frechet_distance_of_shifted_and_scaled_samples() -> None:
    base = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32)
    assert frechet_distance(base, base) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(base + np.float32(0.5), base) == pytest.approx(6 * 0.25, rel=1e-5)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    rng = np.random.default_rng(3)
    first = (rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 1).astype(np.float32)
    second = (rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5))).astype(np.float32)
    one, two = np.cov(first.astype(float), rowvar=False), np.cov(second.astype(float), rowvar=False)
    gap = first.astype(float).mean(0) - second.astype(float).mean(0)
    wanted = gap @ gap + np.trace(one + two - 2 * scipy.linalg.sqrtm(one @ two).real)
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)


def test_the_judge_sees_grey_pictures_of_its_size() -> None:
    seen: dict[str, np.ndarray] = {}

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.update(feeds)
        return {"logits": np.eye(10, dtype=np.float32)[[4, 2]], "features": np.zeros((2, 3), np.float32)}

    images = pictures(0, 2, size=32, channels=3)
    judged = Judge(run)(images)
    assert seen["images"].shape == (2, 1, 16, 16)
    assert seen["images"][1, 0, 3, 5] == pytest.approx(images[1, 6:8, 10:12].mean(), rel=1e-6)
    assert judged.accuracy(np.array([4, 3])) == 0.5
