//! Values that are known by small numbers.
use alloc::vec::Vec;

/// A list whose entries keep their numbers.
pub(crate) struct Slab<T>(Vec<Option<T>>);

impl<T> Slab<T> {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Puts a value in the first free place and gives its number.
    pub(crate) fn insert(&mut self, value: T) -> usize {
        let free = self.0.iter().position(Option::is_none).unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[free] = Some(value);
        free
    }

    pub(crate) fn get(&self, number: usize) -> Option<&T> {
        self.0.get(number)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.0.get_mut(number)?.as_mut()
    }

    pub(crate) fn remove(&mut self, number: usize) -> Option<T> {
        self.0.get_mut(number)?.take()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.0.iter().enumerate().filter_map(|(number, value)| Some((number, value.as_ref()?)))
    }

    /// The numbers of the values that `wanted` picks.
    pub(crate) fn numbers(&self, wanted: impl Fn(&T) -> bool) -> Vec<usize> {
        self.iter().filter(|(_, value)| wanted(value)).map(|(number, _)| number).collect()
    }
}
