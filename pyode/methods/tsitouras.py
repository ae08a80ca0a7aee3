"""Tsitouras' method of order 5."""

from fractions import Fraction

from .tableau import Row, Tableau, combine, exact

# The paper's free numbers to 40 digits; the first column of each row follows from its sum.
_C = exact("0.161", "0.327", "0.9", "0.9800255409045096857298102862870245954942", 1, 1)
_BELOW = (
    (),
    ("0.3354806554923569885444268742502307746751",),
    ("-6.359448489975074843148159912383825625953", "4.362295432869581411017727318190886861028"),
    (
        "-11.74888356406282787774717033978577296189",
        "7.495539342889836208304604784564358155659",
        "-0.09249506636175524925650207933207191611350",
    ),
    (
        "-12.92096931784710929170611868178335939542",
        "8.159367898576158643180400794539253485182",
        "-0.07158497328140099722453054252582973869127",
        "-0.02826905039406838290900305721271224146718",
    ),
    (
        "0.01",
        "0.4798896504144995747752495322905965199130",
        "1.379008574103741893192274821856872770756",
        "-3.290069515436080679901047585711363850116",
        "2.324710524099773982415355918398765796109",
    ),
)


def _row(total: Fraction, below: tuple[str, ...]) -> Row:
    rest = exact(*below)
    return (total - sum(rest, Fraction(0)), *rest)


_A = tuple(_row(c, below) for c, below in zip(_C, _BELOW))
_EMBEDDED_REST = (
    "0.009183565540343253096776363936645313759814",
    "0.4877705284247615707855642599631228241517",
    "1.234297566930478985655109673884237654036",
    "-2.707712349983525454881109975059321670690",
    "1.866628418170587035753719399566211498666",
)
_LAST = Fraction(1, 66)
_B = (*_A[-1], Fraction(0))


def _times_square(factor: str, p: str, q: str) -> Row:
    """Coefficients of factor x^2 (x^2 + p x + q), from x on."""
    f, p_, q_ = exact(factor, p, q)
    return (Fraction(0), f * q_, f * p_, f)


def _roots(factor: str, r1: str, r2: str) -> Row:
    """Coefficients of factor x^2 (x - r1)(x - r2), from x on."""
    f, a, b = exact(factor, r1, r2)
    return (Fraction(0), f * a * b, -f * (a + b), f)


def _first() -> Row:
    """Coefficients of the first stage's weight, f x (x - r)(x^2 + p x + q)."""
    f, r, p, q = exact("-1.0530884977290216", "1.3299890189751412", "-1.4364028541716351", "0.7139816917074209")
    return (-f * r * q, f * (q - r * p), f * (p - r), f)


tsit5 = Tableau(
    name="tsit5",
    order=5,
    a=_A,
    b=_B,
    c=_C,
    error=combine((1, _B), (-1, (*_row(1 - _LAST, _EMBEDDED_REST), _LAST))),
    polynomial=(
        _first(),
        _times_square("0.1017", "-2.1966568338249754", "1.2949852507374631"),
        _times_square("2.490627285651252793", "-2.38535645472061657", "1.57803468208092486"),
        _roots("-16.54810288924490272", "1.21712927295533244", "0.61620406037800089"),
        _roots("47.37952196281928122", "1.203071208372362603", "0.658047292653547382"),
        _roots("-34.87065786149660974", "1.2", "0.666666666666666667"),
        _roots("2.5", "1", "0.6"),
    ),
    source="Ch. Tsitouras, Comput. Math. Appl. 62 (2011)",
)
