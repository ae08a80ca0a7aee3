"""Methods of order 1 to 4, adaptive and with fixed steps."""

from .tableau import Tableau, combine, exact

_BOSH3_B = exact("2/9", "1/3", "4/9", 0)

bosh3 = Tableau(
    name="bosh3",
    order=3,
    a=(exact("1/2"), exact(0, "3/4"), _BOSH3_B[:-1]),
    b=_BOSH3_B,
    c=exact("1/2", "3/4", 1),
    error=combine((1, _BOSH3_B), (-1, exact("7/24", "1/4", "1/3", "1/8"))),
    mid=exact(0, "1/2", 0, 0),
    source="P. Bogacki, L. F. Shampine, Appl. Math. Lett. 2 (1989); dense output as torchdiffeq's",
)

fehlberg2 = Tableau(
    name="fehlberg2",
    order=2,
    a=(exact("1/2"), exact("1/256", "255/256")),
    b=exact("1/512", "255/256", "1/512"),
    c=exact("1/2", 1),
    error=exact("-1/512", 0, "1/512"),
    source="E. Fehlberg, NASA TR R-315 (1969): RK1(2), carrying on the second-order solution",
)

adaptive_heun = Tableau(
    name="adaptive_heun",
    order=2,
    a=(exact(1),),
    b=exact("1/2", "1/2"),
    c=exact(1),
    error=exact("1/2", "-1/2"),
    source="Heun's method with Euler's embedded; Hairer, Norsett, Wanner I, II.4",
)

euler = Tableau(
    name="euler",
    order=1,
    a=(),
    b=exact(1),
    c=(),
    error=None,
    source="L. Euler, Institutionum calculi integralis I (1768); Hairer, Norsett, Wanner I, I.7",
)

midpoint = Tableau(
    name="midpoint",
    order=2,
    a=(exact("1/2"),),
    b=exact(0, 1),
    c=exact("1/2"),
    error=None,
    source="C. Runge, Math. Ann. 46 (1895); Hairer, Norsett, Wanner I, II.1, table 1.1",
)

heun2 = Tableau(
    name="heun2",
    order=2,
    a=(exact(1),),
    b=exact("1/2", "1/2"),
    c=exact(1),
    error=None,
    source="K. Heun, Z. Math. Phys. 45 (1900); the explicit trapezoidal rule",
)

heun3 = Tableau(
    name="heun3",
    order=3,
    a=(exact("1/3"), exact(0, "2/3")),
    b=exact("1/4", 0, "3/4"),
    c=exact("1/3", "2/3"),
    error=None,
    source="K. Heun, Z. Math. Phys. 45 (1900); Hairer, Norsett, Wanner I, II.1, table 1.1",
)

rk4 = Tableau(
    name="rk4",
    order=4,
    a=(exact("1/3"), exact("-1/3", 1), exact(1, -1, 1)),
    b=exact("1/8", "3/8", "3/8", "1/8"),
    c=exact("1/3", "2/3", 1),
    error=None,
    source="W. Kutta, Z. Math. Phys. 46 (1901): the 3/8 rule; Hairer, Norsett, Wanner I, II.1, table 1.2",
)
