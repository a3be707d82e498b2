"""A search among any codecs: what engines serve stays a table of theirs, the rest is a table of names."""

import json
from dataclasses import replace

import pytest
import torch

import tiny_models
from jettison.hooks import ConfigError, InputRefused
from jettison.hooks.quality import summarise
from jettison.plugins.kvtuner import calibration, canary, codecs, tune
from jettison.plugins.kvtuner.artefact import read_pairs, write_pairs
from jettison.plugins.kvtuner.config import KVTunerOptions
from jettison.plugins.kvtuner.hf_cache import PackedCache
from jettison.plugins.kvtuner.ledger import Ledger
from jettison.plugins.kvtuner.prepare import PARTS, TuneSettings, prepare_loaded
from jettison.plugins.kvtuner.quality import log_probabilities, rescore, stored
from jettison.plugins.kvtuner.search import SearchSettings
from jettison.plugins.kvtuner.sensitivity import PAIRS
from jettison.plugins.kvtuner.table import load_table, parse_table, seal
from jettison.plugins.kvtuner.vllm_export import recipe
from kvtuner_samples import content, sealed

FRAGILE, LAYERS, HEADS, SIZE = 2, tiny_models.LAYERS, tiny_models.KV_HEADS, tiny_models.HEAD_SIZE
SETTINGS = TuneSettings(search=SearchSettings("dp", 4, 4, 0), sinks=(0,), length=128, search_length=96, items=0)


class Coarse:
    """A stranger's codec of 3 bits: 8 steps of a fixed width. Costs 3 bits per element and nothing else."""

    name, bits, page_bits = "coarse3", 3, None

    def bytes_per_token(self, head_size):
        return 3 * head_size / 8

    def round_trip(self, x):
        return (x.float() / 0.5).round().clamp(-4, 3) * 0.5


@pytest.fixture
def coarse():
    codecs.register(Coarse())
    yield
    codecs.unregister("coarse3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("codecs") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    """Keys of one layer are eight times as long, so its scores are eight times as far off."""
    loaded = calibration.load_model(str(folder))
    with torch.no_grad():
        loaded[0].model.layers[FRAGILE].self_attn.k_proj.weight.mul_(8)
    return loaded


def random_texts(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (length,), generator=generator) for _ in range(2)]


def searched(folder, model, budget, **settings):
    wanted = replace(SETTINGS, **settings)
    texts = {part: random_texts(number, wanted.longest(part)) for number, part in enumerate(PARTS)}
    prepared = prepare_loaded(str(folder), *model, texts, "random", wanted)
    with Ledger(None) as ledger:
        return prepared, tune.tune(prepared, budget, wanted, ledger)


def test_a_strangers_codec_is_searched_measured_and_kept(folder, model, coarse, tmp_path):
    """Budget: one layer's keys in fp8 (64 bytes a head), all else at 3 bits (24 bytes)."""
    budget = HEADS * (64 + (2 * LAYERS - 1) * 24)
    prepared, outcome = searched(folder, model, budget, codecs=("fp8", "coarse3"))
    outcome.table.save(tmp_path / "t.json")
    table = load_table(tmp_path / "t.json")
    assert table == outcome.table
    assert table.payload.codec == "named"
    expected = [("coarse3", "coarse3")] * LAYERS
    expected[FRAGILE] = ("fp8", "coarse3")
    assert table.payload.named == expected, "the fragile layer's keys get the bytes"
    assert table.sizes.bytes_per_token == budget
    assert table.sizes.nominal_bits == (8 + (2 * LAYERS - 1) * 3) / (2 * LAYERS)
    assert read_pairs(table.search.uniform.pairs) == [("coarse3", "coarse3")] * LAYERS
    verdict = canary.verify(table, model[0])
    assert verdict.holds, verdict
    ids = random_texts(9, 128)[0]
    by_hand = codecs.storing(
        [codecs.get(key) for key, _ in expected],
        [codecs.get(value) for _, value in expected],
        center=prepared.measured[0].key_center,
        scale=prepared.measured[0].key_scale,
    )
    one, other = (log_probabilities(model[0], ids, how) for how in (stored(table), by_hand))
    assert torch.equal(one, other)
    (own,), (uniform,) = (
        rescore(model[0], random_texts(8, 128), [how])
        for how in (stored(table), codecs.storing([Coarse()] * LAYERS, [Coarse()] * LAYERS))
    )
    assert summarise(own).mean_kl < summarise(uniform).mean_kl


def test_who_cannot_hold_named_codecs_says_so(folder, model, coarse):
    table = searched(folder, model, 10**6, codecs=("fp8", "coarse3"))[1].table
    refused = r"layer 0 of the table of 'llama' has the codec fp8/fp8; packed pages hold token-head; use the Hugging Fa"
    with pytest.raises(ConfigError, match=refused):
        table.format(0)
    with pytest.raises(ValueError, match=refused):
        KVTunerOptions(table=table)
    with pytest.raises(ConfigError, match="has the codec named; vLLM stores keys and values per token"):
        recipe(table)
    data = table.content()
    codecs.unregister("coarse3")
    assert parse_table(data).payload.named == [("fp8", "fp8")] * LAYERS
    other = {**data, "payload": {**data["payload"], "layers": [dict(row) for row in data["payload"]["layers"]]}}
    other["payload"]["layers"][1] |= {"key_codec": "coarse3", "key_bits": 4}
    with pytest.raises(InputRefused, match="codec 'coarse3' is unknown; allowed are 16, int8"):
        parse_table(sealed({key: value for key, value in other.items() if key != "payload_sha256"}))


def test_a_strangers_codec_has_no_packed_form(folder, model, coarse):
    table = searched(folder, model, LAYERS * HEADS * 60, codecs=("fp8", "coarse3"))[1].table
    assert "coarse3" in {name for pair in table.payload.named for name in pair}, table.payload.named
    with pytest.raises(
        ConfigError, match="codec 'coarse3' has no packed form in the Hugging Face cache; packed are 16"
    ):
        PackedCache.from_table(table, model[0].config)


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("names", [("fp8", "int4"), ("int4-hadamard", "int2", "16")])
def test_codecs_with_a_packed_form_are_a_cache_that_generates(folder, model, names, sinks):
    """What the cache holds is what the search measured, in the bytes that the table says."""
    _, outcome = searched(folder, model, LAYERS * HEADS * 90, codecs=names, sinks=(sinks,))
    table, config = outcome.table, model[0].config
    assert len(set(table.payload.named)) > 1, table.payload.named
    ids = random_texts(7, 128)[0]
    cache = PackedCache.from_table(table, config)
    with torch.no_grad():
        found = model[0](ids[None], past_key_values=cache).logits[0].log_softmax(-1)
    expected = log_probabilities(model[0], ids, stored(table))
    exact = log_probabilities(model[0], ids)
    off, effect = (found - expected).abs().mean().item(), (exact - expected).abs().mean().item()
    assert off < 0.02 * effect, f"{names}: {off} of {effect}"
    if not sinks:
        native = sum(name == "16" for pair in table.payload.named for name in pair) * HEADS * SIZE * 2
        assert cache.nbytes == 128 * (table.sizes.bytes_per_token + native), "a float32 model keeps 16 bits in 32"
    answer = model[0].generate(ids[None, :20], past_key_values=PackedCache.from_table(table, config), max_new_tokens=12)
    with_own = greedy(model[0], ids[:20], 12, stored(table))
    assert answer[0].tolist() == with_own


def greedy(model, ids, count, how):
    """Greedy continuation of `ids`, the whole text anew for each token."""
    for _ in range(count):
        ids = torch.cat((ids, log_probabilities(model, ids, how)[-1:].argmax(-1)))
    return ids.tolist()


@pytest.mark.parametrize(
    ("names", "codec", "rotate"),
    [
        (("16", "int8", "int4", "int2"), "token-head", False),
        (("int8-hadamard", "int2-hadamard"), "token-head", True),
        (("int8", "int4-hadamard"), "named", False),
        (("16", "fp8"), "named", False),
    ],
)
def test_pages_that_rotate_alike_give_a_table_that_engines_serve(folder, model, names, codec, rotate):
    prepared, outcome = searched(folder, model, LAYERS * HEADS * 140, codecs=names)
    payload = outcome.table.payload
    assert (payload.codec, payload.rotate) == (codec, rotate), names
    assert len(prepared.space.options) == len(names) ** 2
    assert summarise(outcome.finalists[0].parts).mean_kl == pytest.approx(
        summarise(rescore(model[0], prepared.texts["validation"], [stored(outcome.table)])[0]).mean_kl, rel=1e-5
    )
    if codec == "token-head":
        assert {form.rotate for form in outcome.table.formats()} == {rotate}
        assert KVTunerOptions(table=outcome.table).table == outcome.table
        kept = {codecs.get(name).page_bits for name in names}
        assert {side for pair in payload.pairs for side in pair} <= kept, f"{names} only"
    else:
        assert {name for pair in payload.named for name in pair} <= set(names)


def test_the_predicted_kl_is_a_kl_whatever_the_search_goes_by(folder, model):
    for metric in ("kl", "e_o", "norm-ratio"):
        prepared, outcome = searched(folder, model, LAYERS * HEADS * 80, metric=metric)
        rows = prepared.measured[0].kl
        own = sum(rows[layer, PAIRS.index(pair)].item() for layer, pair in enumerate(outcome.table.payload.pairs))
        assert outcome.table.source.predicted_kl == pytest.approx(own), metric


def test_runs_of_names_are_read_as_they_were_written():
    pairs = [("fp8", "16"), *[("int4-hadamard", "2x.y")] * 3, ("16", "16")]
    assert write_pairs(pairs) == "1xfp8/16 3xint4-hadamard/2x.y 1x16/16"
    assert read_pairs(write_pairs(pairs)) == pairs
    assert write_pairs([(8, 4), (4, 4), (4, 4)]) == "k8v4 2xk4v4"
    for text in ("fp8/fp8", "0xfp8/fp8", "1xfp8", "1xfp8/FP8", "1xfp8/fp8/fp8", "1xfp8/fp8  1xfp8/fp8"):
        with pytest.raises(ValueError, match="is not a run of pairs"):
            read_pairs(text)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("fp8", "int3"), "codec 'int3' is unknown; allowed are 16, int8"),
        (("fp8", "fp8"), "name one twice"),
        (("wide",), "codec 'wide' has 32 bits; a table holds codecs of at most 16"),
    ],
)
def test_codecs_that_cannot_be_searched_are_refused(names, sentence):
    wide = type("Wide", (Coarse,), {"name": "wide", "bits": 32})
    codecs.register(wide())
    try:
        with pytest.raises(ConfigError, match=sentence):
            TuneSettings(codecs=names)
    finally:
        codecs.unregister("wide")


def named(**changes):
    base = {key: value for key, value in content(2).items() if key != "payload_sha256"}
    layers = [{"layer": n, "key_bits": 8, "value_bits": 4, "key_codec": "fp8", "value_codec": "int4"} for n in range(2)]
    return {**base, "payload": {**base["payload"], "codec": "named", "rotate": False, "layers": layers, **changes}}


def test_a_named_tables_payload_is_checked():
    table = seal(named())
    assert table.payload.at(1) == "fp8/int4"
    assert table.sizes.nominal_bits == 6.0
    assert table.sizes.bytes_per_token == 2 * 2 * (32 + 32 // 2 + 4 + 1), "codes, scale and zero, and a sink's share"
    plain = [{"layer": n, "key_bits": 8, "value_bits": 4} for n in range(2)]
    half = [{**row, "key_codec": "fp8"} for row in plain]
    wrong = [{**row, "key_codec": "fp8", "value_codec": "int8"} for row in plain]
    for changes, sentence in (
        ({"layers": plain}, "codec named has key_codec and value_codec in every layer"),
        ({"layers": half}, "codec named has key_codec and value_codec in every layer"),
        ({"rotate": True}, "and no rotation but theirs"),
        ({"codec": "token-head"}, "codec token-head has neither key_codec nor value_codec"),
        ({"layers": wrong}, "the bits of layer 0 are not those of its codecs"),
        ({"group_size": 32, "residual": 32}, "codec named has neither group_size nor residual"),
    ):
        with pytest.raises(InputRefused, match=sentence):
            seal(named(**changes))


def test_old_tables_are_read_and_their_hash_stands():
    """Made before predicted_kl could be absent and layers could have names: nothing in them changes."""
    text = json.dumps(content())
    assert "key_codec" not in text
    assert json.loads(text)["source"]["predicted_kl"] == 0.01
    assert parse_table(json.loads(text)).content() == json.loads(text)
    zero = content()
    del zero["payload_sha256"]
    zero["source"]["predicted_kl"] = 0.0
    assert parse_table(sealed(zero)).content()["source"]["predicted_kl"] == 0.0
    del zero["source"]["predicted_kl"]
    assert parse_table(sealed(zero)).source.predicted_kl is None
