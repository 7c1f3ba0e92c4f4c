//! krake-node: one site's process; wires network, catalog, placement, driver and API together.
