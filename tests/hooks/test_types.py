import pickle

import pytest

from jettison.hooks import ConfigError, EnvironmentRefused, InputRefused, JettisonError, KVFormat


def test_message_is_one_sentence_of_three_clauses():
    error = ConfigError("bits is 3", allowed="allowed are 2, 4", do="choose one.")
    assert str(error) == "bits is 3; allowed are 2, 4; choose one."
    assert str(JettisonError("alone")) == "alone."


def test_exit_codes():
    codes = [kind.exit_code for kind in (JettisonError, ConfigError, EnvironmentRefused, InputRefused)]
    assert codes == [2, 2, 3, 4]


def test_refusals_cross_process_borders():
    error = pickle.loads(pickle.dumps(EnvironmentRefused("a", allowed="b", do="c")))
    assert (type(error), str(error), error.do) == (EnvironmentRefused, "a; b; c.", "c")


def test_kv_format_is_a_value():
    left = KVFormat(8, 4, key_center=[[1.0, 2.0]], key_scale=[[1, 2]])
    assert left == KVFormat(8, 4, key_center=((1.0, 2.0),), key_scale=((1.0, 2.0),))
    assert len({left, KVFormat(8, 4)}) == 2


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 8.0, "8", True, None, -8, 2**64])
@pytest.mark.parametrize("side", ["key_bits", "value_bits"])
def test_kv_format_refuses_bits(side, bits):
    with pytest.raises(ConfigError, match=f"KVFormat.{side} is .*allowed are 16, 8, 4, 2"):
        KVFormat(**{"key_bits": 8, "value_bits": 8, side: bits})


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("sink_tokens", -1, "sink_tokens is -1"),
        ("sink_tokens", 1.5, "sink_tokens is 1.5"),
        ("sink_tokens", True, "sink_tokens is True"),
        ("key_center", [], "rows of lengths"),
        ("key_center", [[]], "rows of lengths"),
        ("key_center", [[1.0], [1.0, 2.0]], r"rows of lengths \[1, 2\]"),
        ("key_center", [[float("nan")]], r"key_center\[0\]\[0\] is nan"),
        ("key_scale", [[1.0, 0.0]], r"key_scale\[0\]\[1\] is 0.0; allowed are finite numbers above 0"),
        ("key_scale", [[float("inf")]], r"key_scale\[0\]\[0\] is inf"),
    ],
)
def test_kv_format_refuses_calibration(field, value, found):
    with pytest.raises(ConfigError, match=found):
        KVFormat(8, 8, **{field: value})
