"""What tracing finds of a family is what people wrote down of it; of other kinds of model it finds the parts."""

import pytest

from compression_dags.architectures import KNOWN
from compression_dags.architectures.discovery import discover
from models import FAMILIES, config_of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_families_are_found(family):
    found, written = discover(config_of(family)), KNOWN[family]
    assert (found.stack, found.layers) == (written.stack, written.layers) and len(found.kind_of) == 4
    assert found.embedding == f"{written.stack}.embed_tokens.weight"
    tied = config_of(family).tie_word_embeddings
    assert found.head == (found.embedding if tied else "lm_head.weight")
    for kind in found.kinds:
        dense = [g for g in written.groups if kind.feed_forward == "dense" or not g.name.startswith("mlp_")]
        assert list(kind.groups) == dense
        assert set(kind.norms) == set(written.norms) and set(kind.head_norms) == set(written.head_norms)
        assert kind.input_norms == written.input_norms and kind.norm_offsets == (written.norm_offset,)
        assert kind.branch_norms == written.branch_norms and not kind.shared
        assert set(kind.factors) <= {1.0}
        outputs = [p for g in dense if g.name.endswith("_output") for p in g.projections]
        assert list(kind.writers) == ([] if written.branch_norms else outputs)
        assert bool(kind.experts) == bool(kind.routers) == (kind.feed_forward == "experts")


def test_kinds_are_told_apart():
    found = discover(config_of("qwen3"))
    assert [kind.attention for kind in found.kinds] == ["full_attention", "sliding_attention"]
    assert found.kind_of == (0, 1, 0, 1)
    mixed = discover(config_of("qwen3_moe"))
    assert [kind.feed_forward for kind in mixed.kinds] == ["experts", "dense"] and mixed.kind_of == (0, 1, 0, 0)
