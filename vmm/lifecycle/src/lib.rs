//! lodger-lifecycle
