//! lodger-clock
