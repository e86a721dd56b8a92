//! Cuts a watch in the API server's protobuf encoding into its events: each is preceded by its length, four bytes in network order.

use std::collections::VecDeque;

use super::split::{LARGEST, Unintelligible};

/// How many bytes tell the length.
const LENGTH: usize = 4;

/// The events of a watch while they arrive.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// What has arrived of the event that is not complete yet, with its length.
    partial: Vec<u8>,
    done: VecDeque<Vec<u8>>,
}

impl Frames {
    /// Takes what has arrived.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<(), Unintelligible> {
        while !bytes.is_empty() {
            let lacking = self.lacking()?;
            let (part, rest) = bytes.split_at(lacking.min(bytes.len()));
            self.partial.extend_from_slice(part);
            bytes = rest;
            if self.partial.len() >= LENGTH && self.lacking()? == 0 {
                self.done.push_back(self.partial.split_off(LENGTH));
                self.partial.clear();
            }
        }
        Ok(())
    }

    /// How many bytes are lacking of the length, or of the event.
    fn lacking(&self) -> Result<usize, Unintelligible> {
        let Some(length) = self.partial.first_chunk::<LENGTH>() else {
            return Ok(LENGTH - self.partial.len());
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| Unintelligible)?;
        if length > LARGEST {
            return Err(Unintelligible);
        }
        Ok(LENGTH + length - self.partial.len())
    }

    /// The next event that is complete.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.done.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(events: &[&[u8]]) -> Vec<u8> {
        let length = |event: &[u8]| u32::try_from(event.len()).unwrap().to_be_bytes();
        events.iter().flat_map(|event| [&length(event)[..], event].concat()).collect()
    }

    #[test]
    fn events_are_whole_wherever_the_stream_is_cut() {
        let events: [&[u8]; 4] = [b"first", b"", b"a", &[0; 300]];
        let stream = framed(&events);
        for piece in 1..stream.len() {
            let mut frames = Frames::default();
            stream.chunks(piece).for_each(|piece| frames.push(piece).unwrap());
            let found: Vec<_> = std::iter::from_fn(|| frames.next()).collect();
            assert_eq!(found, events, "{piece}");
            assert_eq!(frames.partial, [0; 0]);
        }
    }

    #[test]
    fn what_is_no_stream_of_events_is_an_error_before_it_is_kept() {
        // The text of a web page, taken for a length, is more than a gigabyte.
        let mut frames = Frames::default();
        assert_eq!(frames.push(b"<html>"), Err(Unintelligible));
        assert!(frames.partial.len() <= LENGTH && frames.next().is_none());
    }
}
