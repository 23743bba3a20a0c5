"""What the `number` grader reads in references and answers, shape by shape. docs/graders.md says the rules."""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from service.rewards import scorers

Score = Callable[..., float]


@pytest.fixture(scope="module")
def score() -> Iterator[Score]:
    """score(answer, reference, cut=False, **options)"""

    @cache
    def scorer(**options: Any) -> Any:
        return scorers.number(**{"tolerance": 0.0, "units": "if_given", "percent": "hundredths"} | options)

    yield lambda answer, reference, cut=False, **options: scorer(**options)(answer, reference, cut)
    logging.disable(logging.NOTSET)


REFERENCES = [
    "42", "-7", "0.5", "1/2", r"\frac{3}{4}", r"\frac34", r"\dfrac{1}{2}", r"\tfrac{1}{2}", r"-\frac{2}{3}", r"2\sqrt{3}",
    r"\sqrt[3]{2}", r"\frac{\sqrt{3}}{2}", r"1+\sqrt{2}", r"3\pi", r"\pi/2", "e^2", "2x+3", "x+2", "x^2-4x+4", "(x+1)(x-2)",
    "(3,4)", "(3, 4)", "(4,3)", "(3,-17)", "[0,5)", "[2,5]", r"(-\infty,3]", r"(-\infty,2)\cup(2,\infty)", r"\{1,2,3\}",
    "{1,2}", "1,2,3", "1, 2, 3", "1 and 2", "1,-2", "x=5", "x = 5", "y=2x+1", r"x\in[1,2]", r"\text{Evelyn}", r"\text{(C)}",
    r"\textbf{(A)}", "(C)", "C", "Evelyn", r"10\%", r"90^\circ", r"90^{\circ}", r"\$18", r"\$18.90", r"\$32,\!348",
    "1,000,000", r"10,\!000", "1{,}000", "1 000", r"3\frac{1}{2}", "3 1/2", r"-3\frac12",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
    r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\left(\frac{1}{2},3\right)", r"\left( 3, \frac{\pi}{2} \right)",
    r"\left[ \frac{1}{2}, 1 \right]", "2+3i", "i", r"\infty", r"5\text{ cm}", r"5\text{ cm}^2", r"12\,\text{cm}",
    r"15\mbox{ cm}^2", r"864 \mbox{ inches}^2", r"5.4 \text{ cents}", "x>3", r"x \le 5", "1<x<3", "1.5e3", "10^5",
    r"1.5 \times 10^3", "3!", r"\binom{5}{2}", "2^{10}", "2^{2n}", r"\log_2 8", r"\sin x", "|x|", r"\emptyset", r"\pm 3",
    r"1 \pm \sqrt{5}", r"\frac{3 \pm \sqrt{17}}{4}", "3:2", "9:30", r"0.\overline{3}", r"0.1\overline{6}", "x^2+y^2=1",
    "2516_8", "4210_{5}", r"\text{June 20}", r"\mathbb{R}", "A, B, C", "f(x)=2x", r"\frac{1}{2}h", "3t", "4c", "5m", ".5",
    "1.", "007", "-0.0", r"\sqrt2", r"\frac{x + 2}{7}", r"\cot 10^\circ", r"1 \frac{3}{8}", "n(n+1)/2",
    r"\text{no solution}", r"\frac{3}{4} \text{ inches}", "(1,2),(3,4)", "72 clips", "3 million dollars",
    "20 miles per hour", "5 km/h", "$18", "€5", "5%", "5 percent", "1e-05", "1e21", "0.00001", "9007199254740993", "- 4",
    "minus 4", "½", "3½", "２０", "−5", "∞", "√2", "π/2", "3×10^4", "90°", "x²+1", "(−1, 2)", "x=1, y=2", "(x,y)=(1,2)",
    "[1, 2, 3]", r"\{ (1,2), (3,4) \}", "a=3, b=4", "$5$", r"\(5\)", r"9\sqrt{3}\text{ sq units}",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_is_a_formula_and_its_own_right_answer(reference: str, score: Score) -> None:
    right = [rf"\boxed{{{reference}}}", rf"So it is $\boxed{{{reference}}}$.", f"<answer> {reference} </answer>"]
    right += [f"#### {reference}", f"Answer: {reference}", reference]
    assert [score(answer, reference) for answer in right] == [1.0] * len(right)
    wrong = ["", "no idea", "123456", "-987654", r"\boxed{}", r"\boxed{123456}", "<answer></answer>", "..."]
    assert [score(answer, reference) for answer in wrong] == [0.0] * len(wrong)


GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"

# reference, answers that are right, answers that are wrong
TABLE: dict[str, tuple[str, list[str], list[str]]] = {
    "introductions": (
        "5",
        ["Therefore, $x=5$.", "So, x = 5.", "Hence, $5$.", "Clearly, $2+3=5$.", r"\boxed{5=x}", r"\boxed{2+3=x}", r"\large 5"],
        ["Therefore, $x=6$.", "Hence, 5, 6", r"\boxed{6=x}", r"\boxed{5=6}", "Therefore, 6"],
    ),
    "introduced pairs": ("(3, 4)", ["Therefore, $(3, 4)$.", "Thus, $(x, y) = (3, 4)$."], ["Therefore, $(4, 3)$."]),
    "introduced lists": ("3, 4", ["Therefore, 3, 4.", "Thus, $x = 3$ and $x = 4$."], ["Therefore, 3, 5."]),
    "exact beside rounded": (
        r"2\sqrt{13}",
        [r"\boxed{2\sqrt{13} \approx 7.21}", r"\boxed{x = 2\sqrt{13} ≈ 7.2}", "7.211103"],
        [r"\boxed{2\sqrt{14} \approx 7.48}", r"\boxed{7.21}"],
    ),
    "an exact reference beside its rounding": (
        r"x = 2\sqrt{13} \approx 7.21",
        [r"\boxed{2\sqrt{13}}", r"\boxed{x = \sqrt{52}}", r"\boxed{2\sqrt{13} \approx 7.211}"],
        [r"\boxed{7.21}", r"\boxed{2\sqrt{14}}", r"\boxed{y = 2\sqrt{13}}"],
    ),
    "a fraction beside its rounding": (r"22/7 \approx 3.14", [r"\boxed{\frac{22}{7}}"], ["3.14", r"\boxed{\pi}"]),
    "an unknown's rounding": (r"\theta \approx 7.21", ["7.21", r"\boxed{\theta \approx 7.21}"], [r"\boxed{2\sqrt{13}}"]),
    "a rounding of a decimal": (r"3.7 \approx 4", ["4"], ["3.7"]),
    "a name stays without a rounding": (r"x = 2\sqrt{13}", [r"\boxed{2\sqrt{13}}"], [r"\boxed{y = 2\sqrt{13}}"]),
    "said in a box": (
        "17",
        [r"\boxed{\text{The answer is }17}", r"\boxed{\text{Answer: } 17}", r"\boxed{\text{The sum is } x = 17}"],
        [r"\boxed{\text{The answer is not }17}", r"\boxed{\text{There is no 16, so it is }18}", r"\boxed{\text{It is }71}"],
    ),
    "commas as text": (
        "1234567",
        [r"\boxed{1\text{,}234\text{,}567}", r"\boxed{1\mathrm{,}234{,}567}"],
        [r"\boxed{1\text{,}2\text{,}567}", r"\boxed{1\text{.}234567}"],
    ),
    "currencies": (
        "$70,000",
        ["USD 70,000", r"\boxed{\text{USD }70,000}", r"\boxed{\$70k}", "$70K", "USD 70k", "The price is USD 70,000."],
        ["EUR 70,000", "70k", r"\boxed{70k}", "$70M", "USD 70", "$70"],
    ),
    "k is a variable": ("70k", [r"\boxed{70k}"], ["70000", "70", "$70k"]),
    "inequalities for a union": (
        r"(-\infty,-5]\cup[5,\infty)",
        [r"x \le -5 \text{ or } x \ge 5", "5 <= x or x <= -5", r"The solution is $x \leq -5$ or $x \geq 5$.", r"t\le-5, t\ge5",
         r"\boxed{x \le -5} or \boxed{x \ge 5}", r"x \le -5 \lor x \ge 5", r"(-\infty,-5] \text{ or } [5,\infty)"],
        ["x < -5 or x > 5", "x <= -5 or x >= 4", "x >= 5", "-5, 5", r"|x| \ge 5", r"x^2 \ge 25", "x >= -5 and x <= 5",
         "x <= -5 and x >= 5", r"x \le -5 \land x \ge 5", "x <= -5 or x >= 5^{9^{9}}", "x <= -5 or x >= 9!!!!"],
    ),
    "a union for inequalities": (
        r"x < -1 \text{ or } 0 < x < 1/2 \text{ or } x = 2",
        [r"\boxed{(-\infty,-1)\cup(0,0.5)\cup\{2\}}", r"x \in \{2\} \cup (0,\frac12) \cup (-\infty,-1)"],
        [r"(-\infty,-1)\cup(0,0.5)", r"y < -1 \text{ or } 0 < y < 1/2 \text{ or } y = 2"],
    ),
    "inequalities that hold together": ("(3, 5)", ["x > 3 and x < 5", "x < 5, x > 3"], ["x > 3 or x < 5", "x > 3, y < 5"]),
    "all but one": (r"x \ne 3", [r"(-\infty,3)\cup(3,\infty)", r"\mathbb{R}\setminus\{3\}", "x < 3 or x > 3"], ["3", "x > 3"]),
    "a union of sets": (
        r"\{1,2,3\}",
        [r"\boxed{\{1,2\}\cup\{3\}}", r"\{3,1\}\cup\{1,2\}"],
        [r"\{1,2\}\cup\{4\}", r"\{1\}\cup\{3\}", r"[1,2]\cup\{3\}"],
    ),
    "a set for a union": (r"\{1,2\}\cup\{3\}", [r"\boxed{\{1,2,3\}}", "1, 2, 3"], [r"\{1,2\}", "1, 2, 4", "(1, 2, 3)"]),
    "inequalities of two unknowns": ("x > 3, y < 5", ["y < 5 and x > 3", "y < 5, x > 3"], ["y < 5 or x > 3", "x > 3"]),
    "one of two inequalities": ("x > 3 or y < 5", ["y < 5 or x > 3"], ["y < 5, x > 3", "y < 5 and x > 3"]),
    "two inequalities for one of two unknowns": ("x < -m or x > m", ["x < -m, x > m"], ["x < m or x > -m"]),
    "an inequality that does not hold": ("x > 3", ["so x > 3"], ["not x > 3", r"\boxed{\text{not } x > 3}", r"\neg(x > 3)"]),
    "a relation that words deny": (
        "x > 3",
        ["It is not true that x < 3. So x > 3.", "It is not 4: x > 3", "It is true that x > 3", "It is false: x > 3 holds"],
        ["It is not true that x > 3", "It is not the case that $x > 3$.", "The answer: it is false that x > 3",
         r"\(x > 3\) fails", "We do not have x > 3", "$x > 3$ does not hold", "It can't be that x > 3", "x > 3 is false.",
         "x > 3 isn't true", r"\boxed{\text{It is not true that } x > 3}", "It is never $x > 3$"],
    ),
    "an equation that words deny": ("x = 5", ["not 4, so x = 5", "x = 5"], ["It is not true that x = 5", "$x = 5$ is wrong"]),
    "an equation beside words that deny another": (
        "x = 5",
        ["-3 is not valid\nx = 5", "the other is not valid\n$$x = 5$$", "So x = -3 is not correct\n\n$x = 5$",
         "If that is not so x = 5", "Therefore, $x = 5$. Fails for others.", "So x = 5.  Is not true for others."],
        ["It is not so that $x = 5$"],
    ),
    "an inequality of which it is asked": ("x > 3", ["We are asked whether or not x > 3"], ["not x > 3"]),
    "looks": (
        "42",
        [
            r"\boxed{42^{\text{nd}}}", r"\boxed{42^\text{nd}}", r"\boxed{42^{nd}}", r"\boxed{\color{red}42}",
            r"\boxed{\textcolor{red}{42}}", r"\boxed{\begin{aligned}42\end{aligned}}", r"\boxed{\begin{split}x&=42\end{split}}",
        ],
        [
            r"\boxed{43^{\text{nd}}}", r"\boxed{42^{n}}", r"\boxed{\color{red}24}", r"\boxed{\begin{split}42\\43\end{split}}",
        ],
    ),
    "degrees as a letter": (
        "90",
        [r"\boxed{90^\text{o}}", r"\boxed{90^{\text{o}}}", "90^o", r"\boxed{90^{o}}"],
        [r"\boxed{90^0}", r"\boxed{9^o}", r"\boxed{90^{ok}}"],
    ),
    "residues": (
        r"7 \pmod{11}",
        [r"\boxed{7}", r"\boxed{7 \pmod{11}}", r"\boxed{x \equiv 7 \pmod{11}}", r"\boxed{7 (mod 11)}"],
        [r"\boxed{7 \pmod{13}}", r"\boxed{x \equiv 7 \pmod{13}}", r"\boxed{8}", r"\boxed{11}", r"\boxed{18}"],
    ),
    "a residue for a number": ("7", [r"\boxed{7 \pmod{11}}", r"\boxed{7 \bmod 11}"], [r"\boxed{18 \pmod{11}}", "4 (mod 7)"]),
    "a rounding beside its exact value": ("7.21", [r"\boxed{2\sqrt{13} \approx 7.21}"], [r"\boxed{2\sqrt{13}}"]),
    "times of day": (
        r"5:00\text{ p.m.}",
        [r"\boxed{5:00 \text{ p.m.}}", "5:00 pm", r"\boxed{5:00\,\text{PM}}", r"\boxed{5:00}", "The answer is 5:00 p.m."],
        [r"\boxed{5:00 \text{ a.m.}}", r"\boxed{5:30 \text{ p.m.}}", r"\boxed{5}"],
    ),
    "final answers": (
        "42",
        [
            "42", "The answer is 42.", "Answer:42", "(42)", "<answer>42</answer>", "#### 42", "$42$", r"\(42\)", "**42**",
            "= 42", "x = 42", "42.0", "４２", "42 apples", "the result is 42 apples.", "**Answer:** 42",
            "Final Answer:\n\n42", "**Final Answer: 42**", "The answer is 41. No, the answer is 42.",
            r"\boxed{41} Wait. \boxed{42}", "Answer: 41\nAnswer: 42", "<answer>41</answer><answer>42</answer>",
            "40 + 2 = 42", r"\boxed{40+2=42}", "84/2", "答案是42", "It's $42.", "### Final Answer\n42",
            "The final answer is $\\boxed{42}$.", "\\boxed{42}\n\nI hope this is right.", "<answer>It is 42.</answer>",
            r"\boxed{\text{42}}", r"\boxed{42 \text{ apples}}", r"\fbox{42}", r"\boxed 42", "2. So 42.", "so 42!",
            "<answer>42", "7 " * 5000 + "so 42",
        ],
        [
            "41", "420", "4", "-42", "4.2", "1,2,42", "The answer is 42. No, the answer is 41.",
            r"\boxed{42} no \boxed{41}", "2025-12-42", "42:10", "Answer: 43. I thought 42.", "42%", r"\frac{1}{42}", "x42y",
            "42nd", "42/2", "42,000", "1" * 5000,
        ],
    ),
    "signs": (
        "-4",
        ["- 4", "minus 4", "negative 4", "−4", "–4", r"\boxed{- 4}", "The answer is -4.", "it is minus 4", "(-4)"],
        ["4", "10 - 4"],
    ),
    "no sign": (
        "4",
        ["4", "Answer:4"],
        ["- 4", "minus 4", "-4", "−4"],
    ),
    "lists": (
        "1, 2, 3",
        [
            "3, 2, 1", r"\boxed{1,2,3}", "1, 2 and 3", "The answers are 1, 2, and 3.", r"\{1,2,3\}",
            r"\boxed{1}, \boxed{2}, \boxed{3}",
        ],
        ["3", "1,2", "1,2,4", "123"],
    ),
    "not the last of a list": (
        "3",
        ["3", "1+2"],
        ["1, 2, 3", r"\boxed{1,2,3}", "3.0001", "3/2"],
    ),
    "times": (
        "10:30",
        ["Answer: 10:30", r"\boxed{10:30}", "at 10:30."],
        ["10:45", "10", "1/3", "21:60"],
    ),
    "per cent": (
        "0.5%",
        ["0.005", "0.5 percent", r"\boxed{0.5\%}"],
        ["0.5", "50%"],
    ),
    "units": (
        "5 cm",
        ["5", "5cm", "0.05 m", "50 mm", r"\boxed{5\text{ cm}}", "5 centimeters"],
        ["5 m", "5 kg", "6 cm", r"\boxed{5\text{ m}}"],
    ),
    "halves": (
        "1/2",
        ["50%", "0.5", ".5", r"\frac12", "½", "2/4"],
        ["1", "2", "12", "50"],
    ),
    "thousands": (
        "3250",
        ["3,250", "3 250", "3 250 ml", "3.25e3", r"3.25 \times 10^{3}", "$3,250"],
        ["3 250 ml bottles", "250", "3.250"],
    ),
    "exponents": (
        "1500",
        ["1.5e3", "1.5E+3", "1.5 x 10^3", "1,500"],
        ["1.5", "150", "15000"],
    ),
    "small": (
        "0.0000001",
        ["1e-7", "10^{-7}", r"1 \times 10^{-7}"],
        ["0.0000004", "0", "0.0000002"],
    ),
    "JSON's exponent": (
        "1e-05",
        ["0.00001", r"\boxed{10^{-5}}"],
        ["1", "0", "-5"],
    ),
    "repeating": (
        "1/3",
        ["0.333333", "0.33333333", "0.(3)"],
        ["0.33", "0.333334", "3"],
    ),
    "irrational": (
        r"\pi",
        ["π", "3.141593", "pi"],
        ["3.14", "3"],
    ),
    "no decimal comma": (
        "3.14",
        ["3.140"],
        [r"\pi", "3,14"],
    ),
    "large and near": (
        "1234567.5",
        ["1,234,567.5"],
        ["1234568.5", "1234567.6"],
    ),
    "beyond a double": (
        "9007199254740993",
        ["9,007,199,254,740,993"],
        ["9007199254740992"],
    ),
    "a float's noise": (
        "0.30000000000000004",
        ["0.3"],
        ["0.31"],
    ),
    "formulas": (
        "2x+3",
        ["3+2x", "$2x + 3$", "The answer is 2x + 3.", "2(x+1.5)"],
        ["2", "3", "2x", "2x-3", "3x+2"],
    ),
    "formulas in prose": (
        "x+2",
        ["2+x", "So we get x + 2"],
        ["2", "x", "x-2"],
    ),
    "tuples": (
        "(3, 4)",
        ["(3,4)", r"\left(3,4\right)", "The point is (3, 4).", "(6/2, 4)"],
        ["4", "(4,3)", "(3,5)", "[3,4]", r"\{3,4\}", "(3,4,5)"],
    ),
    "intervals": (
        "[0,5)",
        ["[0, 5)"],
        ["(0,5)", "[0,5]", "(0,5]", "5"],
    ),
    "bases": (
        "11_2",
        [r"\boxed{11_2}", "11"],
        ["3", "11_3"],
    ),
    "words": (
        r"\text{east}",
        [r"\boxed{East}", "East.", "The answer is east."],
        [r"\boxed{seat}", "west"],
    ),
    "letters": (
        "C",
        ["(C)", r"\boxed{\text{(C)}}", "I think C or D. Answer: C"],
        ["D", "A, B, C", "Answer: D. Or C"],
    ),
    "names": (
        "x=5",
        ["5", "x = 5.0"],
        ["y=5", "x=6", "x"],
    ),
    "money": (
        "$18",
        ["18", "18 dollars", "$18.00"],
        ["€18", "$180", "18 cents"],
    ),
    "matrices": (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        [r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}"],
        [r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}"],
    ),
    "no unit taken away": (
        "3t",
        [r"\boxed{3t}"],
        ["3", r"\boxed{4t}"],
    ),
    "GSM8K's own column": (
        GSM8K,
        ["72", "#### 72", "72 clips"],
        ["24", "48"],
    ),
    "bullets": (
        "3",
        ["- 2\n- 3"],
        ["- 3\n- 2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_answers_are_read_as_they_say(name: str, score: Score) -> None:
    reference, right, wrong = TABLE[name]
    assert {answer: score(answer, reference) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: score(answer, reference) for answer in wrong} == dict.fromkeys(wrong, 0.0)


def test_an_answer_that_was_cut_off_in_a_number_is_none(score: Score) -> None:
    cut = ["The answer is 42", "42", r"\boxed{42", "<answer>42", "#### 42", "so 42.", "$42", "x = 42", "we get 4, 42"]
    assert {answer: score(answer, "42", True) for answer in cut} == dict.fromkeys(cut, 0.0)
    whole = [
        r"\boxed{42} and th",
        r"\boxed{42}",
        "<answer>42</answer>",
        "The answer is 42 app",
        "#### 42\n",
        "so 42 apples",
        "it is $42$",
    ]
    assert {answer: score(answer, "42", True) for answer in whole} == dict.fromkeys(whole, 1.0)


def test_a_long_answer_is_not_cut_into_a_number_at_its_beginning(score: Score) -> None:
    assert scorers.end_of("9" * 5000) == ""
    assert scorers.end_of("1 " * 3000) == "1 " * (scorers.READ_CHARACTERS // 2)


def test_options_say_how_units_percent_and_near_numbers_count(score: Score) -> None:
    assert [score(answer, "5 cm", units="required") for answer in ("5 cm", "5", "5 m")] == [1, 0, 0]
    assert [score(answer, "5 cm", units="ignored") for answer in ("5 cm", "5", "5 m", "6")] == [1, 1, 1, 0]
    assert [score(answer, "50%", percent="sign") for answer in ("50%", "50", "0.5")] == [1, 1, 0]
    assert [score(answer, "3.14", tolerance=0.01) for answer in (r"\pi", "3.15", "3.3")] == [1, 1, 0]


@pytest.mark.parametrize(
    "reference",
    ["2025-12-26", "12/25/2025", "25.12.2025", "forty-two", "no number", "true", "null", "NaN",
     "3 250 ml bottles", "", "  ", "(1,234)",
     "the answer",
     "1.2.3", "He has 5", r"\frac{1", '{"a": 1}', "?", "2 +* ", r"\foo{3}", "5 6"],
)  # fmt: skip
def test_a_reference_that_is_no_single_value_is_refused_with_what_is_allowed(reference: str, score: Score) -> None:
    with pytest.raises(ValueError, match=r"the reference .*allowed are a number"):
        score("1", reference)
