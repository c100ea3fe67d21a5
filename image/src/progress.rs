//! How a build tells its caller how far it has come.

/// Receives the steps of a build, in order. `()` ignores them.
pub trait Progress {
    /// A new step begins, and the one before it is over. `total` is its size in
    /// bytes where that is known.
    fn step(&mut self, what: &str, total: Option<u64>);

    /// So many bytes of the current step are done; never more than its total.
    fn advance(&mut self, done: u64);
}

impl Progress for () {
    fn step(&mut self, _what: &str, _total: Option<u64>) {}
    fn advance(&mut self, _done: u64) {}
}
