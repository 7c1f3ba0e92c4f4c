//! Where an application runs and why: constraints, scores, decisions and their records; pure and deterministic.
