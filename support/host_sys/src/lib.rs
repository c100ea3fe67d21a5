//! lodger-host-sys
