"""Layers of the packed cache, one by one, against each other and transformers' own layers."""

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from cache_samples import BATCH, LAYER_KINDS, SHAPE, fed, held_bytes, kinds, same, states
from jettison.hooks.errors import ConfigError
from jettison.hooks.types import KVFormat
from jettison.plugins.kvtuner.hf_cache import TokenLayer
from jettison.plugins.kvtuner.packing import STEP


@kinds
@pytest.mark.parametrize("cuts", [(1,), (31, 32, 33), (64,), tuple(range(1, 100)), (50, 99)])
def test_how_a_text_is_cut_does_not_matter(kind, cuts):
    key, value = states(100)
    whole = fed(LAYER_KINDS[kind](), key, value)
    pieces = fed(LAYER_KINDS[kind](), key, value, cuts)
    for side, one, other in zip(("keys", "values"), whole, pieces, strict=True):
        assert same(one, other), f"{side} of {kind} cut at {cuts}"


@kinds
@pytest.mark.parametrize("cuts", [(), (64,), tuple(range(1, 129))])
def test_what_is_returned_belongs_to_the_caller(kind, cuts):
    """Overwriting returned tensors, or the given ones, changes nothing that is stored."""
    key, value = states(130)
    expected = fed(LAYER_KINDS[kind](), key, value)
    layer = LAYER_KINDS[kind]()
    for start, stop in itertools.pairwise((0, *cuts, 129)):
        given = [x[:, :, start:stop].clone() for x in (key, value)]
        for tensor in (*layer.update(*given), *given):
            tensor.fill_(1e4)
    found = layer.update(key[:, :, 129:], value[:, :, 129:])
    for one, other in zip(expected, found, strict=True):
        assert same(one, other), f"{kind} cut at {cuts}"


@kinds
@pytest.mark.parametrize("window", [2, 20, 64, 200])
@pytest.mark.parametrize("sizes", [(1,) * 150, (70, 1, 1, 80, 1), (500, 1, 1, 1)])
def test_a_sliding_window_returns_what_transformers_own_layer_does(kind, window, sizes):
    stock = DynamicSlidingWindowLayer(window)
    full, sliding = LAYER_KINDS[kind](), LAYER_KINDS[kind](window)
    key, value = states(sum(sizes))
    at = 0
    for step, size in enumerate(sizes):
        case = f"{kind}, window {window}, step {step} of {sizes[:5]}"
        assert sliding.get_mask_sizes(size) == stock.get_mask_sizes(size), case
        piece = key[:, :, at : at + size], value[:, :, at : at + size]
        exact, all_tokens, found = (layer.update(*piece) for layer in (stock, full, sliding))
        at += size
        for one, unwindowed, other in zip(exact, all_tokens, found, strict=True):
            assert one.shape == other.shape, case
            assert same(other, unwindowed[:, :, -one.shape[2] :]), case
        assert sliding.get_seq_length() == at, case
    if window <= 64 and sum(sizes) > 400:
        assert held_bytes(sliding) < 0.6 * held_bytes(full), f"{kind}: tokens beyond the window {window} are kept"


@kinds
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("back", [1, 5, 31])
def test_crop_goes_back(kind, window, back):
    """Rejected tokens leave no trace in a per-token layer, and none beyond their own block in a per-channel one."""
    key, value = states(120)
    wrong = states(back, seed=9)
    plain, layer = LAYER_KINDS[kind](window), LAYER_KINDS[kind](window)
    layer.activate_past_recording()
    for each in (plain, layer):
        each.update(key[:, :, :80], value[:, :, :80])
    layer.update(*wrong)
    layer.crop(-back)
    assert layer.get_seq_length() == 80, kind
    expected, found = (each.update(key[:, :, 80:90], value[:, :, 80:90]) for each in (plain, layer))
    for one, other in zip(expected, found, strict=True):
        untouched = one.shape[2] if "channel" not in kind or "identity" in kind else one.shape[2] - 26
        assert same(one[:, :, :untouched], other[:, :, :untouched]), f"{kind}, window {window}, {back} back"
        assert one.shape == other.shape, kind


def test_crop_to_an_absolute_length_and_to_nothing():
    key, value = states(50)
    layer = TokenLayer(KVFormat(4, 4))
    layer.update(key, value)
    layer.crop(60)
    assert layer.get_seq_length() == 50
    layer.crop(20)
    assert layer.get_seq_length() == 20
    layer.crop(-30)
    assert layer.get_seq_length() == 0


@kinds
def test_a_window_cannot_go_back_to_tokens_that_are_gone(kind):
    layer = LAYER_KINDS[kind](20)
    key, value = states(400)
    layer.update(key, value)
    with pytest.raises(ConfigError, match=r"cannot go back to 100.*activate_past_recording"):
        layer.crop(-300)
    assert layer.get_seq_length() == 400


@kinds
def test_rows_can_be_reordered_repeated_and_selected(kind):
    key, value = states(70)
    index = torch.tensor([1, 1, 0])
    more = states(3, seed=5, shape=(3, *SHAPE[1:]))
    moved = LAYER_KINDS[kind]()
    moved.update(key, value)
    moved.batch_select_indices(torch.tensor([True, True]))
    moved.batch_repeat_interleave(2)
    moved.reorder_cache(torch.tensor([2, 3, 1]))
    fresh = LAYER_KINDS[kind]()
    fresh.update(key[index], value[index])
    for one, other in zip(fresh.update(*more), moved.update(*more), strict=True):
        assert same(one, other), kind


@kinds
def test_padding_moves_with_its_row(kind):
    key, value = states(70)
    more = states(3, seed=5)
    swapped, fresh = LAYER_KINDS[kind](), LAYER_KINDS[kind]()
    swapped.pad(torch.tensor([0, 5]))
    fresh.pad(torch.tensor([5, 0]))
    swapped.update(key, value)
    swapped.reorder_cache(torch.tensor([1, 0]))
    fresh.update(key.flip(0), value.flip(0))
    for one, other in zip(fresh.update(*more), swapped.update(*more), strict=True):
        assert same(one, other), kind


@kinds
def test_reset_forgets_and_frees(kind):
    layer, fresh = LAYER_KINDS[kind](), LAYER_KINDS[kind]()
    layer.update(*states(90, seed=1))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, held_bytes(layer)) == (0, 0, 0), kind
    again = states(40, shape=(1, 3, 32))
    for one, other in zip(fresh.update(*again), layer.update(*again), strict=True):
        assert same(one, other), kind


@kinds
@pytest.mark.parametrize("pads", [(0, 5), (32, 64), (40, 3)])
def test_padding_is_no_text(kind, pads):
    """Whatever stands in the padding, a row's tokens read back the same; in whole blocks, as without padding."""
    key, value = states(50)
    width = max(pads)
    results = []
    for garbage in (1e4, -1e4, 0.0):
        rows = [torch.full((BATCH, 3, width + 50, 32), garbage) for _ in range(2)]
        for row, pad in enumerate(pads):
            for mine, exact in zip(rows, (key, value), strict=True):
                mine[row, :, width : width + 50] = exact[row]
                if pad < width:  # a longer text: its first tokens stand where the other row has padding
                    mine[row, :, pad:width] = exact[row, :, : width - pad]
        layer = LAYER_KINDS[kind]()
        layer.pad(torch.tensor(pads))
        results.append((rows, fed(layer, *rows, (width // 2 + 1, width + 20))))
    (rows, first), *others = results
    for row, pad in enumerate(pads):
        solo = LAYER_KINDS[kind]()
        alone = solo.update(*(mine[row : row + 1, :, pad:] for mine in rows))
        for side in (0, 1):
            for _, other in others:
                assert same(first[side][row, :, pad:], other[side][row, :, pad:]), f"{kind}, padding {pads}"
            if "channel" not in kind or pad % 64 == 0 or "identity" in kind:
                assert same(first[side][row, :, pad:], alone[side][0]), f"{kind}, padding {pads}, row {row}"


@kinds
def test_sink_tokens_are_exact_and_their_bytes_counted(kind):
    key, value = states(70)
    layer = LAYER_KINDS[kind]()
    keys, values = layer.update(key, value)
    sinks = layer.form.sink_tokens
    assert torch.equal(keys[:, :, :sinks], key[:, :, :sinks])
    assert torch.equal(values[:, :, :sinks], value[:, :, :sinks])
    if layer.form.key_bits < 16:
        assert not torch.equal(keys[:, :, sinks : sinks + 1], key[:, :, sinks : sinks + 1]), kind
    assert held_bytes(layer) == layer.nbytes, f"{kind}: nbytes is not what is held"


def test_it_grows_by_a_step_and_returns_what_leaves_the_window():
    layer = TokenLayer(KVFormat(8, 8), window=10)
    key, value = states(1)
    sizes = set()
    for _ in range(5 * STEP):
        layer.update(key, value)
        sizes.add(layer.nbytes)
    per_token = SHAPE[0] * SHAPE[1] * 2 * (32 + 4)
    assert sizes == {STEP * per_token, 2 * STEP * per_token}
