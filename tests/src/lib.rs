//! Tests of the whole: the architecture's laws, and machines from end to end. See the files beside `src`.
