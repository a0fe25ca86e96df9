"""Functions that the host calls, of any type: accepted if it is the type of the WIT, else refused by both types."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.host.engine import runtime
from agent.host.engine.runtime import HANDLER, HEALTH, STATE, TASK
from fleet.protocol.codes import RejectCode

# A type is a word, or a tuple: its kind and what is in it. Fields are pairs of name and type; None is no type.
BYTES, OUTCOME = ("list", "u8"), ("result", None, "string")
REQUEST = ("record", ("method", "string"), ("target", "string"), ("headers", "string"), ("body", BYTES))
RESPONSE = ("record", ("status", "u16"), ("headers", "string"), ("body", BYTES))
# Name of the function, its parameters and its result.
CALLED = {
    (HANDLER, "handle"): ((REQUEST,), RESPONSE),
    (HEALTH, "check"): ((), OUTCOME),
    (TASK, "run"): (("u64",), OUTCOME),
    (STATE, "save-state"): ((), ("result", BYTES, "string")),
    (STATE, "load-state"): ((BYTES,), OUTCOME),
}
LABEL = st.sampled_from(["method", "status", "headers", "body", "a", "b-c"])
WORDS = st.sampled_from(["bool", "s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64", "char", "string"])


def fields(inner):
    return st.lists(st.tuples(LABEL, inner), min_size=1, max_size=4, unique_by=lambda field: field[0])


def larger(inner):
    maybe = st.none() | inner
    return st.one_of(
        st.tuples(st.sampled_from(["list", "option"]), inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: ("tuple", *found)),
        st.tuples(st.just("result"), maybe, maybe),
        fields(inner).map(lambda found: ("record", *found)),
        fields(maybe).map(lambda found: ("variant", *found)),
        st.lists(LABEL, min_size=1, max_size=4, unique=True).map(lambda found: ("enum", *found)),
        st.lists(LABEL, min_size=1, max_size=4, unique=True).map(lambda found: ("flags", *found)),
    )


TYPES = st.recursive(WORDS, larger, max_leaves=6)


@pytest.fixture(scope="module")
def engine():
    return runtime.Engine()


class Text:
    """Types of an interface: records and their like are exported by names, as functions need them."""

    def __init__(self):
        self.lines = []

    def of(self, kind):
        """Return how a type is referred to."""
        match kind:
            case str():
                return kind
            case ("list" | "option" | "tuple", *inner):
                return f"({kind[0]} {' '.join(self.of(each) for each in inner)})"
            case ("result", well, ill):
                parts = ["" if well is None else self.of(well), "" if ill is None else f"(error {self.of(ill)})"]
                return f"(result {' '.join(parts)})"
            case ("record", *inner):
                parts = [f'(field "{name}" {self.of(each)})' for name, each in inner]
                return self.named(f"(record {' '.join(parts)})")
            case ("variant", *inner):
                parts = [f'(case "{name}" {"" if each is None else self.of(each)})' for name, each in inner]
                return self.named(f"(variant {' '.join(parts)})")
            case (word, *names):
                return self.named(f"({word} {' '.join(json.dumps(name) for name in names)})")

    def named(self, text):
        number = len(self.lines)
        self.lines.append(f'(type $d{number} {text}) (export "t{number}" (type $t{number} (eq $d{number})))')
        return f"$t{number}"


def image(engine, interface, function, params, result):
    """Make an image that imports the function: types are compared as those of exports are, and need no code."""
    text = Text()
    taken = " ".join(f'(param "p{number}" {text.of(each)})' for number, each in enumerate(params))
    given_back = "" if result is None else f"(result {text.of(result)})"
    return engine.read(f"""(component (import "{interface}@0.1.0" (instance
        {" ".join(text.lines)} (export "{function}" (func {taken} {given_back})))))""")


def places(kind, path=()):
    """List the paths to all types within one."""
    found = [path]
    if isinstance(kind, tuple):
        for number, each in enumerate(kind[1:], 1):
            if kind[0] in {"list", "option", "tuple", "result"} and each is not None:
                found += places(each, (*path, number))
            elif kind[0] in {"record", "variant"} and each[1] is not None:
                found += places(each[1], (*path, number, 1))
    return found


def put(kind, path, new):
    """Put another type at a path."""
    if not path:
        return new
    return (*kind[: path[0]], put(kind[path[0]], path[1:], new), *kind[path[0] + 1 :])


@st.composite
def functions(draw):
    called = draw(st.sampled_from(sorted(CALLED)))
    params, result = CALLED[called]
    match draw(st.sampled_from(["param", "result", "more", "fewer", "none", "any"])):
        case "param" if params:
            params = (put(params[0], draw(st.sampled_from(places(params[0]))), draw(TYPES)),)
        case "more":
            params = (*params, draw(TYPES))
        case "fewer":
            params = params[1:]
        case "none":
            result = None
        case "any":
            params, result = tuple(draw(st.lists(TYPES, max_size=2))), draw(TYPES)
        case _:
            result = put(result, draw(st.sampled_from(places(result))), draw(TYPES))
    return called, params, result


@settings(max_examples=300, deadline=None)
@given(functions())
def test_a_function_is_called_only_if_it_is_of_its_type(engine, function):
    called, params, result = function
    made = image(engine, *called, params, result)
    if (params, result) == CALLED[called]:
        made.check_imports()
        return
    with pytest.raises(runtime.EngineError, match=r"expected .*, found ") as caught:
        made.check_imports()
    assert caught.value.code is RejectCode.START_FAILED


@pytest.mark.parametrize("called", CALLED)
def test_the_type_of_the_wit_is_accepted(engine, called):
    image(engine, *called, *CALLED[called]).check_imports()
