//! lodger-softmmu
