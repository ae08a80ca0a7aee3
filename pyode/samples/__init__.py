"""What `solve_ivp` has beyond `odeint`: what is told, watched and differentiated sample by sample."""
