"""The ways to a gradient: through the steps (direct), and by the adjoint equation (backsolve)."""
