//! lodger-lapic
