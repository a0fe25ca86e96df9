"""`serde<1.0.200`: what is asked for, and which packages are meant."""

import pytest

from fleet.evidence import query
from fleet.evidence.query import Answer
from fleet.evidence.sbom import DocumentError, Package

YES, MAYBE, NO = Answer.YES, Answer.MAYBE, Answer.NO


@pytest.mark.parametrize(
    ("question", "package", "answer"),
    [
        ("serde", Package("serde", "1.0.0", "cargo"), YES),
        ("serde", Package("serde_json", "1.0.0", "cargo"), NO),
        ("Serde", Package("serde", "", "cargo"), YES),
        ("serde<1.0.200", Package("serde", "1.0.199", "cargo"), YES),
        ("serde<1.0.200", Package("serde", "1.0.200", "cargo"), NO),
        ("serde<=1.10", Package("serde", "1.9.0", "cargo"), YES),
        ("serde==1.0.200", Package("serde", "1.0.200", "cargo"), YES),
        ("openssl>=3.0,<3.0.15", Package("openssl", "3.0.9"), YES),
        ("openssl>=3.0,<3.0.15", Package("openssl", "3.0.15"), NO),
        # each ecosystem's own order
        ("x<1.0.0", Package("x", "1.0.0-rc.1", "cargo"), YES),
        ("x<1.0", Package("x", "1.0rc1", "pypi"), YES),
        ("libc6<2.36-9+deb12u4", Package("libc6", "2.36-9+deb12u3", "deb", "debian"), YES),
        ("golang.org/x/net<0.17.0", Package("net", "v0.16.0", "golang", "golang.org/x"), YES),
        # names as each ecosystem spells them
        ("Foo_Bar", Package("foo-bar", "1", "pypi"), YES),
        ("foo_bar", Package("foo-bar", "1", "cargo"), YES),
        ("foo_bar", Package("foo-bar", "1", "npm"), NO),
        ("name", Package("name", "1", "npm", "@scope"), YES),
        ("@scope/name", Package("name", "1", "npm", "@scope"), YES),
        ("@other/name", Package("name", "1", "npm", "@scope"), NO),
        ("org.example:lib<2", Package("lib", "1.0", "maven", "org.example"), YES),
        # package URLs
        ("pkg:cargo/serde", Package("serde", "1", "cargo"), YES),
        ("pkg:npm/serde", Package("serde", "1", "cargo"), NO),
        ("pkg:cargo/serde@1.0.0", Package("serde", "1.0.0", "cargo"), YES),
        ("pkg:cargo/serde@1.0.0", Package("serde", "1.0.1", "cargo"), NO),
        ("pkg:npm/%40scope/name<2", Package("name", "1.9.0", "npm", "@scope"), YES),
        # what cannot be decided is never a no
        ("x<2", Package("x", "", "cargo"), MAYBE),
        ("x<2", Package("x", "weird"), MAYBE),
        ("x==weird", Package("x", "weird"), YES),
        ("x>1,<2", Package("x", "0.9", "cargo"), NO),
    ],
)
def test_which_packages_a_question_means(question: str, package: Package, answer: Answer) -> None:
    assert query.parse(question).matches(package) is answer


@pytest.mark.parametrize("text", ["", "<1", "serde<", "serde<1,,", "a b", "serde 1.0", "pkg:foo", "x<<1", "x<1 y"])
def test_what_is_no_question_gets_examples(text: str) -> None:
    with pytest.raises(DocumentError) as caught:
        query.parse(text)
    assert "\n" not in str(caught.value)
