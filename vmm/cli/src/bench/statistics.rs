//! Medians and their spread.

/// A sample's median and quartiles, in the sample's unit.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) lower_quartile: f64,
    pub(crate) upper_quartile: f64,
    pub(crate) minimum: f64,
    pub(crate) maximum: f64,
}

/// None of nothing.
pub(crate) fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        median: quantile(&sorted, 0.5)?,
        lower_quartile: quantile(&sorted, 0.25)?,
        upper_quartile: quantile(&sorted, 0.75)?,
        minimum: *sorted.first()?,
        maximum: *sorted.last()?,
    })
}

/// Linear between the two nearest ranks.
fn quantile(sorted: &[f64], at: f64) -> Option<f64> {
    let position = at * (sorted.len().checked_sub(1)? as f64);
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    let (low, high) = (sorted.get(below)?, sorted.get(above)?);
    Some(low + (high - low) * (position - position.floor()))
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn medians_and_quartiles() {
        assert_eq!(summary(&[]), None);
        let one = summary(&[7.0]).unwrap();
        assert_eq!((one.median, one.lower_quartile, one.maximum), (7.0, 7.0, 7.0));
        let four = summary(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((four.median, four.lower_quartile, four.upper_quartile), (2.5, 1.75, 3.25));
        assert_eq!((four.minimum, four.maximum), (1.0, 4.0));
    }
}
