# SPDX-License-Identifier: Apache-2.0
"""The cache of encoder outputs: the same bits as without it, what an entry belongs to, bounds, bad files."""

from __future__ import annotations

import os
import pickle
import resource
import threading
import time
import warnings
from dataclasses import fields

import pytest
import torch
from generalist_fakes import Fake

from semisam import SemiSAMTerm, _memory
from semisam.generalists import cache as caching
from semisam.generalists.cache import EncoderCache, WeightsHash
from semisam.generalists.sam_med3d import SamMed3D
from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (20, 24, 16)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SamMed3DNetwork(Architecture.small())


def pictures(batch, *shape, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def sam_med3d(**options):
    return SamMed3D(network=network(), **options)


def hugging_face(name):
    pytest.importorskip("transformers")
    from hf_models import small  # noqa: PLC0415

    from semisam.generalists import hf_sam  # noqa: PLC0415

    return getattr(hf_sam, name)(model=small(name.lower()))


def vista3d():
    pytest.importorskip("monai.networks.nets.vista3d")
    from test_vista3d import small  # noqa: PLC0415

    from semisam.generalists.vista3d import Vista3D  # noqa: PLC0415

    return Vista3D(network=small(), resample_mm=1.5)


GENERALISTS = {
    "sam-med3d": (lambda: sam_med3d(resample_mm=1.5), (2, *SHAPE), (2.0, 1.0, 1.5)),
    "sam": (lambda: hugging_face("Sam"), (3, 40, 56), None),
    "sam2": (lambda: hugging_face("Sam2"), (1, 40, 56), None),
    "sam3": (lambda: hugging_face("Sam3"), (1, 40, 56), None),
    "medsam": (lambda: hugging_face("MedSam"), (1, 40, 56), None),
    "vista3d": (vista3d, (1, *SHAPE), (2.0, 1.0, 1.5)),
}


class Stub:
    """A generalist of one number per image, which remembers what it encoded."""

    spec = Fake(torch.zeros(1)).spec

    def __init__(self, about="", numbers=100, dtype=torch.float32):
        self.about, self.numbers, self.dtype = about, numbers, dtype
        self.encoded = 0

    def fingerprint(self):
        return self.about

    def encode(self, images, *, spacing=None):
        self.encoded += len(images)
        means = images.double().flatten(1).mean(1, keepdim=True)
        return [m.expand(self.numbers).to(self.dtype) for m in means]

    def pack(self, state):
        return [(m, m[:1]) for m in state]

    def unpack(self, samples, images, *, spacing=None):
        assert len(samples) == len(images)
        return [s[0] for s in samples]


def same(a, b):
    """Whether two states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


# ---- the same as without ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ram", "folder"])
@pytest.mark.parametrize("name", GENERALISTS)
def test_states_are_those_of_the_generalist_bit_for_bit(name, where, tmp_path):
    make, shape, spacing = GENERALISTS[name]
    model, images = make(), pictures(3, *shape)
    expected = model.encode(images, spacing=spacing)
    cache = EncoderCache() if where == "ram" else EncoderCache(tmp_path, ram_mb=0)
    first = cache.encode(model, images[:2], spacing=spacing)
    assert (cache.hits, cache.misses) == (0, 2)
    order = torch.tensor([2, 0, 1, 0])  # new, known, known, and once more
    mixed = cache.encode(model, images[order], spacing=spacing)
    assert (cache.hits, cache.misses) == (3, 3)
    assert same(cache.encode(model, images, spacing=spacing), expected)
    assert same(model.pack(first), model.pack(expected)[:2])
    assert same(model.pack(mixed), [model.pack(expected)[i] for i in order])
    assert cache.misses == 3


@pytest.mark.parametrize("folder", [False, True])
def test_the_term_is_the_same_with_a_cache(folder, tmp_path):
    images = pictures(2, 1, *SHAPE)
    logits = 4 * torch.stack([-images[:, 0], images[:, 0]], 1)
    logits[:, 1, 5:15, 6:18, 4:12] += 12
    results = {}
    for cache in (None, EncoderCache(tmp_path if folder else None)):
        term = SemiSAMTerm(sam_med3d(), total_steps=100, clicks=3, sample_gate=0.0, cache=cache)
        for step, batch in ((49, slice(1, 2)), (50, slice(0, 2))):
            given = logits[batch].clone().requires_grad_()
            loss = term(images[batch], given, step=step)
            loss.backward()
        results[cache is None] = loss.detach(), given.grad
        counted = term.diagnostics["cache_hits"], term.diagnostics["cache_misses"]
        assert counted == ((0, 0) if cache is None else (1, 1))
    assert results[True][0] > 0
    assert same(results[True], results[False])


def test_slices_of_a_volume_are_kept_one_by_one():
    model = hugging_face("Sam2")
    volume = pictures(1, 1, 6, 40, 32)
    logits = torch.full((1, 2, 6, 40, 32), -4.0)
    logits[:, 1, 1:4, 10:30, 8:24] = 4
    logits[:, 0] = -logits[:, 1]
    term = SemiSAMTerm(model, total_steps=100, clicks=2, cache=EncoderCache())
    values = []
    for step in (50, 50):
        values.append(term(volume, logits, step=step))
    assert (term.diagnostics["cache_hits"], term.diagnostics["cache_misses"]) == (3, 0)
    assert term.cache.misses == 3
    plain = SemiSAMTerm(model, total_steps=100, clicks=2)(volume, logits, step=50)
    assert values[0] == values[1] == plain > 0


def test_a_generalist_without_the_methods_is_asked_every_time():
    fake = Fake(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    cache = EncoderCache()
    assert cache.encode(fake, torch.zeros(2, 1, 8, 8), spacing=(1, 1)) == 2
    cache.encode(fake, torch.zeros(2, 1, 8, 8))
    assert len(fake.encoded) == 2
    assert (cache.hits, cache.misses) == (0, 0)


def test_errors_are_the_generalists_own():
    for images in (torch.zeros(2, 8, 8), "image"):
        with pytest.raises((TypeError, ValueError), match=r"SamMed3D.encode\(\): images"):
            EncoderCache().encode(sam_med3d(), images)


# ---- what an entry belongs to -------------------------------------------------------------------


def test_what_makes_an_image_another_one():
    cache, stub, image = EncoderCache(), Stub(), torch.zeros(1, 1, 4, 6)
    cache.encode(stub, image)
    for count, (other, spacing, model) in enumerate(
        [
            (image.index_fill(3, torch.tensor([5]), 1.0), None, stub),
            (image.double(), None, stub),
            (image.to(torch.bfloat16), None, stub),
            (image.reshape(1, 1, 6, 4), None, stub),
            (image.reshape(1, 2, 3, 4), None, stub),
            (image, (1.0, 1.0), stub),
            (image, (1.0, 2.0), stub),
            (image, None, Stub("other")),
        ],
        2,
    ):
        cache.encode(model, other, spacing=spacing)
        assert (cache.hits, cache.misses) == (0, count)
    cache.encode(stub, image.transpose(2, 3).contiguous().transpose(2, 3))  # in another order in memory
    cache.encode(stub, image, spacing=(1, 1))
    assert cache.hits == 2


def test_another_version_encodes_anew(tmp_path, monkeypatch):
    """What an earlier one left in files may have been made in another way."""
    stub, image = Stub(), torch.zeros(1, 1, 4, 6)
    EncoderCache(tmp_path).encode(stub, image)
    monkeypatch.setattr(caching.info, "version", "99.0", raising=True)
    later = EncoderCache(tmp_path)
    later.encode(stub, image)
    assert (later.hits, later.misses) == (0, 1)


@pytest.mark.parametrize(("name", "package"), [("sam", "transformers"), ("vista3d", "monai")])
def test_the_package_behind_a_generalist_is_part_of_its_fingerprint(name, package, monkeypatch):
    model = GENERALISTS[name][0]()
    before = model.fingerprint()
    assert model.fingerprint() == before
    monkeypatch.setattr(f"{package}.__version__", "99.0")
    assert model.fingerprint() != before


def test_weights_and_settings_are_part_of_a_fingerprint():
    made = network()
    first = SamMed3D(network=made)
    found = {SamMed3D(network=made, **options).fingerprint() for options in ({}, {"background": 0.0})}
    found |= {SamMed3D(network=made, **o).fingerprint() for o in ({"normalize": False}, {"resample_mm": 1.0})}
    found |= {SamMed3D(network=made, precision="bfloat16").fingerprint()}
    assert len(found) == 5
    before = first.fingerprint()
    assert before in found
    assert before == SamMed3D(network=network()).fingerprint()
    with torch.no_grad():
        made.image_encoder.pos_embed[0, 0, 0, 0, 0] += 1e-6
    assert first.fingerprint() not in found
    assert SamMed3D(network=network(seed=1)).fingerprint() not in found


def test_weights_are_read_again_only_after_a_change(monkeypatch):
    read = []
    plain = caching._bytes
    monkeypatch.setattr(caching, "_bytes", lambda t: read.append(1) or plain(t))
    layer, weights = torch.nn.Linear(3, 2), WeightsHash()
    digests = {weights.of(layer), weights.of(layer)}
    assert len(read) == 2
    layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    digests.add(weights.of(layer))
    assert len(read) == 4
    layer.register_buffer("hidden", torch.ones(1), persistent=False)
    digests.add(weights.of(layer))
    layer.bias = torch.nn.Parameter(torch.ones(2))
    digests.add(weights.of(layer))
    digests.add(weights.of(layer.double()))
    assert len(digests) == 5
    again = pickle.loads(pickle.dumps(weights))
    assert again.of(layer) in digests


# ---- bounds -------------------------------------------------------------------------------------


def image_of(number):
    return torch.full((1, 1, 4, 4), float(number))


def test_memory_is_bounded_and_what_was_used_longest_ago_goes():
    stub = Stub(numbers=1 << 16)  # 256 KiB, and 4 bytes
    cache = EncoderCache(ram_mb=1)
    for number in (0, 1, 2, 0, 3):
        cache.encode(stub, image_of(number))
        assert cache.used_bytes <= 1 << 20
    assert (cache.hits, cache.misses) == (1, 4)  # three fit
    cache.encode(stub, image_of(0))
    cache.encode(stub, image_of(1))
    assert (cache.hits, cache.misses) == (2, 5)
    large = Stub("large", numbers=1 << 19)
    cache.encode(large, image_of(0))
    cache.encode(large, image_of(0))
    assert cache.misses == 7
    assert 0 < cache.used_bytes <= 1 << 20


def test_a_view_does_not_keep_what_it_was_cut_from():
    cache = EncoderCache()
    cache.encode(Stub(), image_of(1))  # hands out expanded numbers and views of them
    for t in next(iter(cache._entries.values())):
        assert t.untyped_storage().nbytes() == t.nbytes


def test_files_are_bounded_and_old_ones_go(tmp_path):
    stub = Stub(numbers=1 << 16)
    cache = EncoderCache(tmp_path, ram_mb=0, disk_mb=1)
    mine = tmp_path / "notes.txt"
    mine.write_text("x" * 2_000_000)
    abandoned, busy = (tmp_path / f".{'0' * 64}.{'0' * 15}{k}.part" for k in (1, 2))
    for path in (abandoned, busy):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    for number in (0, 1, 2, 0, 3):
        cache.encode(stub, image_of(number))
        time.sleep(0.01)  # the files' times differ
    assert (cache.hits, cache.misses) == (1, 4)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= 1 << 20
    cache.encode(stub, image_of(0))  # it was used after 1
    assert cache.hits == 2
    assert mine.exists()
    assert busy.exists()
    assert not abandoned.exists()
    large = Stub("large", numbers=1 << 19)
    cache.encode(large, image_of(0))
    assert set(tmp_path.glob("*.safetensors")) == set(files)


@pytest.mark.parametrize("name", ["ram_mb", "disk_mb"])
def test_bounds_are_checked(name):
    with pytest.raises(ValueError, match=rf"EncoderCache\(\): {name}: expected 0 or a positive number"):
        EncoderCache(**{name: -1})


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_files_outlive_their_cache_and_stay_as_they_are(dtype, tmp_path):
    first, second = Stub(dtype=dtype), Stub(dtype=dtype)
    (made,) = EncoderCache(tmp_path).encode(first, image_of(3))
    cache = EncoderCache(tmp_path, ram_mb=0)
    (found,) = cache.encode(second, image_of(3))
    assert (second.encoded, cache.hits) == (0, 1)
    assert same(found, made)
    content = next(tmp_path.glob("*.safetensors")).read_bytes()
    found.zero_()  # which nobody should do
    assert next(tmp_path.glob("*.safetensors")).read_bytes() == content
    assert same(cache.encode(second, image_of(3)), [made])


def test_files_are_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    (made,) = EncoderCache(tmp_path).encode(Stub(), image_of(2))
    (path,) = tmp_path.iterdir()
    found = safetensors.load_file(path)
    assert list(found) == ["0", "1"]
    assert same([found["0"], found["1"]], [made, made[:1]])


def damaged(content):
    middle = len(content) - 100
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    yield from (b"", b"short", content[:-1], content[: len(content) // 2], content[:40], flipped)
    yield from (content + b"more", b"\x93NUMPY" + content, bytes(2000), b"\xff" * 2000)
    header = content.replace(b'"dtype": "F32"', b'"dtype": "F64"')
    yield from (header, content.replace(b'"shape": [100]', b'"shape": [101]'))
    yield content.replace(b'"crc32"', b'"crc33"')


def test_damaged_files_are_told_of_and_made_anew(tmp_path):
    (made,) = EncoderCache(tmp_path).encode(Stub(), image_of(2))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for bad in damaged(content):
        assert bad != content
        path.write_bytes(bad)
        stub, cache = Stub(), EncoderCache(tmp_path, ram_mb=0)
        with pytest.warns(RuntimeWarning, match=r"EncoderCache\(\): .*made anew"):
            assert same(cache.encode(stub, image_of(2)), [made])
        assert stub.encoded == 1
        assert path.read_bytes() == content
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(cache.encode(stub, image_of(2)), [made])
        assert stub.encoded == 1


def test_another_entry_under_this_name_is_not_believed(tmp_path):
    cache = EncoderCache(tmp_path, ram_mb=0)
    cache.encode(Stub(), image_of(1))
    (first,) = tmp_path.iterdir()
    cache.encode(Stub(), image_of(2))
    (second,) = set(tmp_path.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    with pytest.warns(RuntimeWarning, match="another one"):
        assert float(cache.encode(Stub(), image_of(2))[0][0]) == 2


def test_a_file_that_another_process_removes_meanwhile_is_no_fault(tmp_path, monkeypatch):
    EncoderCache(tmp_path).encode(Stub(), image_of(4))
    (path,) = tmp_path.iterdir()
    plain = torch.from_file

    def removed_first(*args, **options):
        path.unlink()
        return plain(*args, **options)

    monkeypatch.setattr(torch, "from_file", removed_first)
    stub = Stub()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(EncoderCache(tmp_path).encode(stub, image_of(4))[0][0]) == 4
    assert stub.encoded == 1


def test_a_full_disk_is_told_of_once_and_leaves_nothing_behind(tmp_path):
    cache, stub = EncoderCache(tmp_path), Stub(numbers=1 << 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # writes fail in the middle of a file
    try:
        with pytest.warns(RuntimeWarning, match="cannot be written.*goes on without new files") as told:
            found = [float(cache.encode(stub, image_of(number))[0][0]) for number in (1, 2, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found == [1, 2, 1]
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []
    assert (cache.hits, cache.misses) == (1, 2)  # in memory


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        EncoderCache(tmp_path / "file" / "folder")


def test_several_writers_share_a_folder(tmp_path):
    """Caches that know nothing of each other, at once, in a folder that is too small for all entries."""
    wrong = []

    def work(first):
        cache, stub = EncoderCache(tmp_path, ram_mb=0, disk_mb=0.1), Stub(numbers=1 << 12)
        for number in range(40):
            value = (first + number) % 10
            (found,) = cache.encode(stub, image_of(value))
            if not bool((found == value).all()):
                wrong.append(value)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert [str(w.message) for w in told] == []
    files = list(tmp_path.iterdir())
    assert files
    assert all(f.suffix == ".safetensors" for f in files)
    assert sum(f.stat().st_size for f in files) <= 0.1 * 2**20


# ---- in a training ------------------------------------------------------------------------------


def small_sam():
    """A generalist by its dotted name."""
    return sam_med3d()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from semisam.engine.phantom import write_phantoms  # noqa: PLC0415

    root = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(root, labeled=2, unlabeled=2, test=0, shape=(20, 20, 20))


def settings(data, **more):
    from semisam.engine import config  # noqa: PLC0415

    changed = {
        "data.root": str(data),
        "specialist.options": {"channels": [4, 8]},
        "term.generalists": ["test_cache.small_sam"],
        "term.options": {"clicks": 2, "lam_sam": 5.0, "warmup": 0.0, "sample_gate": 0.0, "p_min": 0.0},
        "term.gate": False,
        "train.patch_size": [16, 16, 16],
        "train.steps": 6,
        "train.device": "cpu",
        "train.log_every": 1,
    }
    return config.load(settings=[*changed.items(), *((k.replace("__", "."), v) for k, v in more.items())])


ROUNDS = {"term__offline": True, "term__offline_start": 2, "term__refresh": 2}


def test_rounds_over_the_same_scans_encode_them_once(data, tmp_path, capsys):
    """By default in memory; another run finds what one left in a folder; all have the same weights."""
    from semisam.engine import checkpoint, trainer  # noqa: PLC0415

    found, said = [], []
    for name, cache in (("none", "off"), ("ram", "auto"), ("a", tmp_path / "kept"), ("b", tmp_path / "kept")):
        out = tmp_path / name
        trainer.train(settings(data, **ROUNDS, term__cache=str(cache)), out)
        found.append(checkpoint.read(out / "last.ckpt")["student"])
        text = capsys.readouterr()
        lines = [line for line in (text.out + text.err).splitlines() if "labeled as wholes" in line]
        said.append([line.partition("mean weight ")[2].partition(", ")[2] for line in lines])
    assert said[0] == ["", ""]
    assert said[1] == said[2] == ["0 images known before", "2 images known before"]
    assert said[3] == ["2 images known before"] * 2
    for state in found[1:]:
        assert all(torch.equal(state[k], v) for k, v in found[0].items())


def test_the_log_has_hits_misses_seconds_and_memory(tmp_path):
    """Two scans of 17^3 have 16 patches of 16^3, some of which come again."""
    from semisam.engine import trainer  # noqa: PLC0415
    from semisam.engine.files import read_table  # noqa: PLC0415
    from semisam.engine.phantom import write_phantoms  # noqa: PLC0415

    data = write_phantoms(tmp_path / "data", labeled=2, unlabeled=2, test=0, shape=(17, 17, 17))
    trainer.train(settings(data, term__cache=True, train__augment=False), tmp_path / "run")
    rows = read_table(tmp_path / "run" / "log.csv")
    hits, misses = ([int(row[f"term_cache_{what}"]) for row in rows] for what in ("hits", "misses"))
    assert [h + m for h, m in zip(hits, misses, strict=True)] == [2] * 6
    assert sum(hits) >= 2
    assert misses[0] == 2
    assert all(float(row["term_s"]) > 0 for row in rows)
    if _memory._begin() is not None:
        assert all(float(row["term_mb"]) >= 0 for row in rows)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"term__cache": "file/inside"}, "term.cache: .*file/inside: expected a folder"),
        ({"term__cache": ""}, "term.cache: expected auto, off, ram or a folder, got nothing"),
        ({"term__cache_mb": -1}, "term.cache_mb: expected at least 0, got -1"),
        (
            {"term__preset": "published", "term__cache": "ram"},
            "term.cache: expected off with the preset 'publ",
        ),
    ],
)
def test_settings_that_do_not_fit(more, error, data, tmp_path, monkeypatch):
    from semisam.engine import config, trainer  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(config.ConfigError, match=error):
        trainer.train(settings(data, **more), tmp_path / "run")


def test_generalists_without_anything_to_keep_are_told_of(data, tmp_path, capsys):
    from semisam.engine import trainer  # noqa: PLC0415

    more = {"term__cache": "ram", "term__generalists": ["random-walker"], "train__steps": 1}
    trainer.train(settings(data, **more), tmp_path / "run")
    text = capsys.readouterr()
    assert "term.cache: these generalists have no encoder outputs" in text.out + text.err


# ---- what a part of a step costs ----------------------------------------------------------------


def test_memory_that_is_only_needed_for_a_while_counts():
    with _memory.cost_of("cpu") as little:
        pass
    with _memory.cost_of("cpu") as much:
        bytearray(b"x" * (64 << 20)).clear()
    assert much.seconds > 0
    if _memory._begin() is None:
        assert little.mib is much.mib is None
    else:
        assert little.mib is not None
        assert much.mib is not None
        assert little.mib < 32
        assert much.mib > 56


def test_where_nobody_tells_there_is_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(_memory, "_PROCESS", tmp_path / "nowhere")
    with _memory.cost_of("cpu") as cost:
        pass
    assert cost.mib is None


def test_bytes_of_live_tensors_are_counted():
    """What the benchmark of memory rests on: storages once, gone ones no more, backward passes, too."""
    from benchmarks.memory import LiveBytes, specialist_memory, term_memory  # noqa: PLC0415

    with LiveBytes() as count:
        a = torch.zeros(1000, requires_grad=True)
        made = 2 * a
        view = made[:10]
        assert (count.live, count.peak) == (8000, 8000)
        del made
        assert count.live == 8000  # the view keeps it
        del view
        assert (count.live, count.peak) == (4000, 8000)
        torch.empty(0).sum()
        (a * a).sum().backward()
        assert count.live == 8000  # and its gradient
        assert count.peak >= 12000
        b = torch.zeros(500, dtype=torch.float64)
        torch.add(b, 1, out=b)
        assert count.live == 12000
    small = {"side": 16, "classes": 1, "precision": "float32", "architecture": Architecture.small()}
    found = [
        term_memory(batch=b, clicks=k, generalists=g, **small)
        for b, k, g in ((1, 2, 1), (1, 10, 1), (2, 10, 2))
    ]
    images_prob_logits = 5 * 16**3 * 4 / 2**20
    weights = sum(t.nbytes for t in (*network().parameters(), *network().buffers())) / 2**20
    for row, times in zip(found, (1, 1, 2), strict=True):
        assert row["weights_mib"] == pytest.approx(times * weights)
        assert row["given_mib"] == pytest.approx(times * images_prob_logits)
        assert row["total_mib"] == pytest.approx(sum(row[f"{n}_mib"] for n in ("weights", "given", "term")))
    assert 0 < found[0]["term_mib"] < found[1]["term_mib"] < found[2]["term_mib"]
    two, three, four = (specialist_memory("unet3d", batch, 32) for batch in (2, 3, 4))
    assert four - three == pytest.approx(three - two, rel=0.01)
    assert three - two > 20
