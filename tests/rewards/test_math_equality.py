"""Which answers are right: equal in another form is, and a near miss is not."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.rewards import is_correct, math_reward, math_reward_batch
from dcpo_megatron.rewards.mathematics.verdict import quick_verdict

RIGHT = [
    ("5", "5"),
    ("005", "5"),
    ("+5", "5"),
    ("5.0", "5"),
    ("5.", "5"),
    (".5", "0.5"),
    ("1,234", "1234"),
    ("1{,}234", "1,234"),
    (r"10,\!080", "10080"),
    ("1 000 000", "1000000"),
    (r"12\ 345", "12345"),
    (r"11\,111\,111\,100", r"11,\! 111,\! 111,\! 100"),
    ("−3", "-3"),
    ("0.75", r"\frac{3}{4}"),
    ("3/4", r"\frac34"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac12"),
    (r"\frac\pi2", r"\frac{\pi}{2}"),
    ("-(1/2)", r"-\frac12"),
    (r"\frac{9}{5}", r"1\frac{4}{5}"),
    ("137.5", r"137 \frac{1}{2}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"6.72 \times 10^{-5}", ".0000672"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\sqrt{452}", r"2\sqrt{113}"),
    (r"\sqrt{49}", "7"),
    ("2^{10}", "1024"),
    (r"0.5\pi", r"\frac{\pi}{2}"),
    ("7i+2", "2+7i"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", r"90^\circ"),
    ("90 degrees", r"90^\circ"),
    (r"90\text{ degrees}", r"90^\circ"),
    ("18.9", r"\$18.90"),
    ("18.90 dollars", r"\$18.90"),
    ("5.4", r"5.4 \text{ cents}"),
    ("15", r"15\mbox{ cm}^2"),
    ("15 cm^2", r"15\mbox{ cm}^2"),
    (r"12\pi\text{ square units}", r"12\pi"),
    ("5 million", "5,000,000"),
    (r"10\%", "10"),
    (r"10\%", "0.1"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\textbf{Evelyn}", r"\text{Evelyn}"),
    (r"\text{no solution}", r"\text{No Solution}"),
    ("C", r"\text{(C)}"),
    ("(C)", "C"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("5,3,2", "2,3,5"),
    (r"\{5,3,2\}", "2,3,5"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"2 \text{ and } 3", "2,3"),
    ("x=2, x=3", "2,3"),
    (r"3-2\sqrt2, 3+2\sqrt2", r"3 \pm 2 \sqrt{2}"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("2x+3", "y = 2x + 3"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"-2\le x\le 7", r"x \in [-2,7]"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    ("ab+2a+5b+10", "(a+5)(b+2)"),
    ("1+x^2", "x^2+1"),
    ("204_{5}", "204_5"),
    ("204", "204_5"),
    (r"\begin{bmatrix}1/5\\-18/5\end{bmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    ("-5x+7y-11z-4=0", "5x - 7y + 11z + 4 = 0"),
    (r"\$5\$", "5"),
    (r"\text{5 apples}", "5"),
    (r"\log_2 8", "3"),
    ("5", r"The answer is $\boxed{5}$."),
]

WRONG = [
    ("6", "5"),
    ("-5", "5"),
    ("12", "1.2"),
    ("100", "10"),
    ("1.234", "1,234"),
    ("1,2", "12"),
    ("0.74", r"\frac{3}{4}"),
    ("0.333333333333", r"\frac13"),
    ("0.3", r"0.\overline{3}"),
    (".0000673", ".0000672"),
    ("1.414214", r"\sqrt{2}"),
    ("37.699112", r"12\pi"),
    ("(2,1)", "(1,2)"),
    ("2,1", "(1,2)"),
    ("(3,2,1)", "(1,2,3)"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2)", r"\{1,2\}"),
    ("[0,1]", "(0,1)"),
    ("(0,1)", "[0,1]"),
    ("[0,1)", "[0,1]"),
    (r"(-\infty,0)", r"(-\infty, 0]"),
    (r"[2,12)\cup(12,102)", r"(2,12) \cup (12,102)"),
    ("2", "2,3"),
    ("2,3", "2"),
    ("3", r"\pm 3"),
    ("204_6", "204_5"),
    ("10_2", "10"),
    ("y=3", "x=3"),
    ("x>3", r"x\ge 3"),
    ("2t", "2"),
    ("5m", "5"),
    ("2 thirds", "2"),
    (r"2\text{ thirds}", "2"),
    ("5 squared", "5"),
    ("1 000", "0"),
    ("1 2", "12"),
    ("31/2", "3 1/2"),
    ("2-7i", "2+7i"),
    (r"\text{odd}", r"\text{even}"),
    ("D", r"\text{(C)}"),
    ("5:15", "10:30"),
    (r"5 \text{ a.m.}", r"5 \text{ p.m.}"),
    (r"-\infty", r"\infty"),
    ("garbage", "5"),
    ("5)", "5"),
    (r"\frac{1}{0}", "1"),
    (r"\text{}", "5"),
    ("", "5"),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_an_equal_answer_earns_one(answer, gold):
    assert math_reward(f"So the answer is $\\boxed{{{answer}}}$.", gold) == 1.0


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_a_near_miss_earns_zero(answer, gold):
    assert math_reward(f"So the answer is $\\boxed{{{answer}}}$.", gold) == 0.0


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_plain_integers_are_decided_without_algebra(a, b):
    assert quick_verdict(str(a), str(b)) is (a == b)
    assert quick_verdict(f"{a:,}", str(b)) is (a == b)


@settings(deadline=None)
@given(st.fractions(), st.fractions())
def test_fractions_are_compared_exactly_without_algebra(a, b):
    assert quick_verdict(f"\\frac{{{a.numerator}}}{{{a.denominator}}}", f"{b.numerator}/{b.denominator}") is (a == b)


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="0123456789,.+-*/^_()[]{}\\ %$=&xie\n²₂٣π", max_size=80),
    st.sampled_from(["5", "x", "(1,2)", "2_3"]),
)
def test_the_quick_verdict_never_raises(answer, gold):
    assert quick_verdict(answer, gold) in (True, False, None)
    assert quick_verdict(gold, answer) in (True, False, None)


@pytest.mark.parametrize(
    "piece",
    ["1", "1 ", "111 ", "111,", "1.", r"\frac", r"\frac{", r"\frac1", r"\text{", r"\text{a}",
     "a ", "{", "}", "(", "x_{", "\\ ", "^"],
)  # fmt: skip
def test_the_quick_verdict_is_fast_on_hostile_answers_at_the_length_limit(piece):
    answer = (piece * 2000)[:2000]
    start = time.perf_counter()
    quick_verdict(answer, "5")
    quick_verdict("5" + answer[1:], r"\frac{1}{2}")
    assert time.perf_counter() - start < 2


def test_an_answer_beyond_the_length_limit_is_compared_as_a_string():
    long = "1+" * 50_000 + "1"
    assert quick_verdict(long, "50001") is False  # without algebra
    assert math_reward(f"\\boxed{{{long}}}", "50001") == 0.0
    assert math_reward(f"\\boxed{{{long}}}", long) == 1.0


def test_a_batch_equals_its_parts_in_order():
    answers = [pair[0] for pair in RIGHT[:20] + WRONG[:20]] * 2
    golds = [pair[1] for pair in RIGHT[:20] + WRONG[:20]] * 2
    responses = [f"\\boxed{{{answer}}}" for answer in answers] + ["no box"]
    expected = ([1.0] * 20 + [0.0] * 20) * 2 + [-1.0]
    assert math_reward_batch(responses, [*golds, "5"]) == expected
    assert math_reward_batch(responses, [*golds, "5"], workers=2) == expected


def test_a_batch_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="1 responses came with 0 ground truths"):
        math_reward_batch(["a"], [])


def test_only_plus_one_is_correct():
    assert is_correct(1.0)
    assert not is_correct(0.0)
    assert not is_correct(-1.0)
