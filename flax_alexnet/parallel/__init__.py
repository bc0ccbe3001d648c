"""Several devices and several processes: who holds what, and how processes find each other."""
