//! lodger-guest-memory
