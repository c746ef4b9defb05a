"""The sample a tokenizer learns from: of the training split, at most so much, and steady."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from lm.base.errors import InputError
from lm.prepare.documents import split_documents
from lm.prepare.learning_sample import BINS, learning_sample
from lm.prepare.sources import SourceConfig

# of Python 3.12; the threads of this process are those of the test runner
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "\U0001f600"]


@pytest.fixture
def config(tmp_path, data_config):
    """Settings that read 4,000 short documents, in 12 shards."""
    draw = random.Random(0)
    texts = [f"{i} " + " ".join(draw.choices(WORDS, k=12)) for i in range(4_000)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(texts))
    path = str(tmp_path / "text")
    return replace(data_config, path=path, separator="\n\n", shard_bytes=20_000)


def sample(config, limit_bytes, num_workers=1):
    """The texts of a sample."""
    return learning_sample(config, limit_bytes, num_workers).decode().split("\0")


def training(config):
    return [d.text for side, d in split_documents(config, Counter()) if side == "train"]


def size(texts):
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_all_of_the_training_split_if_it_fits(config, split):
    config = replace(config, split=split)
    expected = training(config)
    assert len(expected) > 3_900
    assert sample(config, size(expected)) == expected
    assert len(sample(config, size(expected) - 1)) < len(expected)


@pytest.mark.parametrize("limit", [3_000, 50_000, 180_000])
def test_at_most_as_much_as_is_wanted_and_hardly_less_in_order(config, limit):
    expected = training(config)
    found = sample(config, limit)
    assert limit - 5 * size(expected) / BINS < size(found) <= limit
    chosen = set(found)
    assert found == [text for text in expected if text in chosen]


def test_the_same_for_any_number_of_workers(config):
    assert sample(config, 50_000, 3) == sample(config, 50_000, 1)


def test_documents_from_everywhere_are_in_it(config):
    numbers = [int(text.split()[0]) for text in sample(config, 50_000)]
    quarters = Counter(number // 1_000 for number in numbers)
    assert min(quarters.values()) > 0.6 * max(quarters.values())


def test_at_least_something(config):
    found = sample(config, 1)
    assert 0 < len(found) < 100


def test_nearly_the_same_after_the_text_has_grown(config, tmp_path):
    before = set(sample(config, 50_000))
    more = "\n\n".join(f"more {i} {WORDS[i % 7]} and the fox" for i in range(100))
    (tmp_path / "text" / "0.txt").write_text(more)
    after = set(sample(config, 50_000))
    assert len(before & after) > 0.95 * len(before)
    assert any(text.startswith("more") for text in after)


def test_duplicates_are_in_it_once_by_request(config, tmp_path):
    again = "\n\n".join(training(config)[:1_000])
    (tmp_path / "text" / "b.txt").write_text(again)
    with_all = replace(config, sources={
        "twice": SourceConfig("a.txt", "text", None),
        "more": SourceConfig(".", "text", None),
    })  # fmt: skip
    once = sample(replace(with_all, deduplicate=True), 1 << 30)
    assert once == training(replace(config, path=f"{config.path}/a.txt"))
    assert len(sample(with_all, 1 << 30)) == 2 * len(once) + 1_000


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "valid"), (1 - 1e-9, "train")])
def test_a_side_without_documents_is_refused(config, fraction, empty):
    with pytest.raises(InputError, match=f"the {empty} split has no documents"):
        sample(replace(config, valid_fraction=fraction), 1_000)
