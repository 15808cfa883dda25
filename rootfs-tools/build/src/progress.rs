//! What a build tells while it goes on.

/// Which step something is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepId<'a> {
    /// The stage's name, or its index.
    pub stage: &'a str,
    /// The step's number in its stage, from 1; FROM is the first.
    pub number: usize,
    /// How many there are.
    pub of: usize,
}

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A step begins: its text.
    Started(&'a str),
    /// Its result was in the cache.
    Cached,
    /// A RUN step printed something.
    Output(&'a [u8]),
    /// It is done.
    Done,
}

/// Takes events, from several threads.
pub trait Progress: Sync {
    /// Something happens.
    fn event(&self, step: StepId<'_>, event: Event<'_>);
}

/// Takes them and says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: StepId<'_>, _: Event<'_>) {}
}
