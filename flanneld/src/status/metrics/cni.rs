//! Figures of the CNI plugin's calls.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;

use super::{Out, prefixed};
use crate::cni_calls::{BOUNDS, CniCalls};

impl Out<'_> {
    pub(super) fn cni(&mut self, calls: &CniCalls) -> fmt::Result {
        let requests = calls.requests.iter().flat_map(|(verb, codes)| {
            codes.iter().map(move |(code, count)| {
                (vec![("verb", verb.clone()), ("code", code.clone())], *count as f64)
            })
        });
        let requests: Vec<_> = requests.collect();
        self.counters("cni_requests", "Calls of the CNI plugin, by verb and code; 0 is success.", &requests)?;
        if calls.durations.is_empty() {
            return Ok(());
        }
        let name = prefixed("cni_seconds");
        let mut metric =
            self.begin(&name, "How long calls of the CNI plugin took.", MetricType::Histogram)?;
        for (verb, of) in &calls.durations {
            let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(of.buckets).collect();
            let count = of.buckets.iter().sum();
            let labels = vec![("verb", verb.clone())];
            let mut metric = metric.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(of.sum_seconds, count, &buckets, None)?;
        }
        Ok(())
    }
}
