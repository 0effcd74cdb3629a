"""IJB-C in miniature, in the layout in which insightface distributes it."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_shards.transform import TEMPLATE

SUBJECTS = 8


class Miniature(NamedTuple):
    folder: Path
    templates: dict[int, list[tuple[str, int, float]]]
    """(image, medium, detector's score) of each image of a template."""
    pairs: list[tuple[int, int, int]]
    galleries: dict[str, list[tuple[int, int]]]
    probes: list[tuple[int, int]]


def write_ijb(
    folder: Path, prefix: str = "ijbc", galleries: tuple[str, str] = ("G1", "G2"), seed: int = 0
) -> Miniature:
    """Eight subjects, half of them in each gallery; a gallery template and two probes each, one with a video of three frames."""
    rng = np.random.default_rng(seed)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    templates: dict[int, list[tuple[str, int, float]]] = {}
    subject_of: dict[int, int] = {}
    lines, number = [], 1
    for template, (subject, kind) in enumerate(
        ((s, k) for s in range(SUBJECTS) for k in ("gallery", "video", "still")), start=11
    ):
        media = {"gallery": [500, 501], "video": [700, 700, 700, 501], "still": [502]}[kind]
        subject_of[template], templates[template] = 100 + subject, []
        for medium in media:
            name, score = f"{number}.jpg", round(float(rng.uniform(0.3, 1)), 3)
            points = write_face(folder / "loose_crop" / name, 40 * subject, rng)
            lines.append(" ".join([name, *(f"{value:.3f}" for value in points.ravel()), str(score)]))
            templates[template].append((name, medium, score))
            number += 1
    enrolled = {name: [] for name in galleries}
    for place, template in enumerate(sorted(templates)[::3]):
        enrolled[galleries[place % 2]].append((template, subject_of[template]))
    probes = [(template, subject_of[template]) for place, template in enumerate(sorted(templates)) if place % 3]
    first = [template for listed in enrolled.values() for template, _ in listed]
    pairs = [(a, b, int(subject_of[a] == subject_of[b])) for a in first for b, _ in probes]
    rows = [f"{name} {template} {medium}" for template, images in templates.items() for name, medium, _ in images]
    write = {f"{prefix}_face_tid_mid.txt": rows, f"{prefix}_name_5pts_score.txt": lines}
    write[f"{prefix}_template_pair_label.txt"] = [f"{a} {b} {same}" for a, b, same in pairs]
    for name, listed in enrolled.items():
        write[f"{prefix}_1N_gallery_{name}.csv"] = ["TEMPLATE_ID,SUBJECT_ID", *(f"{t},{s}" for t, s in listed)]
    write[f"{prefix}_1N_probe_mixed.csv"] = ["TEMPLATE_ID,SUBJECT_ID", *(f"{t},{s}" for t, s in probes)]
    for name, text in write.items():
        (folder / "meta" / name).write_text("\n".join([*text, ""]))
    return Miniature(folder, templates, pairs, enrolled, probes)


def write_face(path: Path, shade: int, rng: np.random.Generator) -> np.ndarray:
    """A picture, turned and scaled, with a bright spot at each of five points; returns the points, shape (5, 2)."""
    angle, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.9, 1.4)
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    points = (TEMPLATE - 56) @ turn.T + 110 + rng.uniform(-8, 8, 2)
    rows, columns = np.indices((220, 220))
    pixels = (
        60 + 50 * np.sin(columns / (7 + shade / 30)) * np.cos(rows / (11 + shade / 50)) + rng.normal(0, 12, (220, 220))
    )
    for x, y in points:
        pixels[(columns - x) ** 2 + (rows - y) ** 2 < 36] = 250
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(buffer, "JPEG", quality=95)
    path.write_bytes(buffer.getvalue())
    return points
