"""Settings of a conversion."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from data_shards.pictures import MAX_PIXELS
from data_shards.transform import TransformConfig

Order = Literal["groups", "identity", "random", "source"]
Duplicates = Literal["keep", "report", "drop"]
Check = Literal["decode", "header"]
ReadableBy = Literal["owner", "group", "all"]


@dataclass(kw_only=True, frozen=True)
class ConvertConfig:
    """All but `workers` and `readable_by` decide the bytes that come out."""

    holdout_identities: int | float | tuple[str, ...] = 0
    """Identities kept out of training as a whole: how many, a fraction (1.0: all, an evaluation set), or their names."""
    holdout_images: int = 0
    """Images of each training identity kept out of training; identities with fewer than this + 2 images give none."""
    shard_bytes: int = 256 * 2**20
    """A shard is closed before it would grow beyond this many bytes; a sample larger than that gets its own.
    Counted before transformations."""
    shard_samples: int | None = None
    """A shard is closed after this many samples, too; None: by its bytes alone."""
    images_per_group: int = 4
    """K: images of one identity that lie together in a shard; the K of the PK batches for streaming."""
    order: Order = "groups"
    """groups: each identity's images in groups of K, groups shuffled over all shards. identity: sorted by identity and
    key. random: shuffled. source: as they lie in the source."""
    seed: int = 0
    """Draws the held-out identities and images and the shuffle."""
    check: Check = "decode"
    """decode: every picture is decoded once, completely. header: only its header and its end are looked at."""
    max_pixels: int = MAX_PIXELS
    """Width times height above which a picture is refused as a decompression bomb."""
    min_images: int = 1
    """Identities with fewer listed pictures are left out."""
    min_size: int = 1
    """Pixels: pictures whose shorter side is smaller are left out."""
    keep_identities: tuple[str, ...] | None = None
    """Only these identities, by name or id; None: all."""
    leave_out_identities: tuple[str, ...] = ()
    """Not these identities, by name or id: those of the sets that will be tested on."""
    only_pictures: str = ""
    """File that lists the pictures to take, `identity/image.jpg` a line (VGGFace2's train_list.txt); empty: all."""
    duplicates: Duplicates = "keep"
    """Byte-identical pictures: kept; kept and reported; or only the first of them taken."""
    near_duplicates: Duplicates = "keep"
    """The same for pictures of one identity whose perceptual hashes differ in at most `near_distance` bits."""
    near_distance: int = 2
    """Of 64 bits; of 400 ORL pictures, each taken for itself, 11 have a near duplicate at 2, 38 at 4."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """Resize, crop and re-encode on the way; by default every byte stays."""
    regions: tuple[str, ...] = ()
    """CSV files of boxes (crop "box") or five landmarks (crop "align"), VGGFace2's loose_bb_*.csv or loose_landmark_*.csv."""
    identity_meta: str = ""
    """VGGFace2's identity_meta.csv, which gives each id a name; empty: the one in SOURCE or beside it, where there is one."""
    pseudonyms: str = ""
    """File to write real names to, one that must not exist yet; the shards then hold made-up ones alone. Empty: real names."""
    workers: int | None = None
    """Processes; None: as many as this process may use cores."""
    readable_by: ReadableBy = "owner"
    """Who may read what is written."""

    def __post_init__(self) -> None:
        held = self.holdout_identities
        if isinstance(held, float) and not 0 < held <= 1:
            raise ValueError(f"holdout_identities is {held}; a fraction is between 0 and 1, a count is a whole number")
        if isinstance(held, int) and held < 0:
            raise ValueError(f"holdout_identities is {held}; a count is 0 or more")
        if self.holdout_images < 0:
            raise ValueError(f"holdout_images is {self.holdout_images}; a count is 0 or more")
        for name in (
            "shard_bytes",
            "shard_samples",
            "images_per_group",
            "max_pixels",
            "min_images",
            "min_size",
            "workers",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if not 0 <= self.near_distance <= 16:
            raise ValueError(f"near_distance is {self.near_distance}; it must be 0 to 16 of 64 bits")
        for name, allowed in (
            ("order", get_args(Order)),
            ("check", get_args(Check)),
            ("duplicates", get_args(Duplicates)),
            ("near_duplicates", get_args(Duplicates)),
            ("readable_by", get_args(ReadableBy)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if (self.transform.crop == "none") != (not self.regions):
            raise ValueError(
                f"crop is {self.transform.crop!r} with {len(self.regions)} region files: give both or none"
            )

    @property
    def evaluation_only(self) -> bool:
        """Whether every identity is held out, so that there is nothing to train on."""
        return self.holdout_identities == 1.0 and isinstance(self.holdout_identities, float)

    @property
    def surveys(self) -> bool:
        """Whether every picture has to be read once before the shards can be planned."""
        return self.duplicates != "keep" or self.near_duplicates != "keep"

    @property
    def file_mode(self) -> int:
        return {"owner": 0o600, "group": 0o640, "all": 0o644}[self.readable_by]

    def options(self) -> dict[str, Any]:
        """The settings that decide the bytes, as JSON holds them."""
        chosen = {
            name: value for name, value in asdict(self).items() if name not in ("workers", "readable_by", "pseudonyms")
        }
        return chosen | {"pseudonyms": bool(self.pseudonyms)}
