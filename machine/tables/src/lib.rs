//! lodger-tables
