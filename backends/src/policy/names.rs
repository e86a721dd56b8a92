//! The names of objects, which are hashes of their contents, and the sets of members under theirs; pure.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::image::{Content, ImageSet, MemberKey};
use super::members::Members;
use super::settings::digit;
use crate::nft::{KeyType, Set};

/// The longest text of a comment.
const COMMENT_MAX: usize = 127;

/// What the names of sets of these members begin with; the size follows.
pub(super) fn stem(key: &MemberKey) -> String {
    let kind = if key.port.is_some() { 'n' } else { 's' };
    format!("{kind}{}-{}", digit(key.family), hash(&(&key.pods, &key.port)))
}

/// The set of these members.
pub(super) fn member_set(key: &Arc<MemberKey>, members: &Members) -> ImageSet {
    let size = members.size(key);
    let fields = [KeyType::address(key.family), KeyType::Protocol, KeyType::Port];
    let fields = if key.port.is_some() { &fields[..] } else { &fields[..1] };
    let mut set = Set::new(format!("{}-{size}", stem(key)), fields).with_size(size);
    set.comment = Some(words(key));
    ImageSet { set, content: Content::Members(Arc::clone(key)) }
}

/// What a set of members is about, for the reader of `nft list ruleset`.
fn words(key: &MemberKey) -> String {
    let mut words = match &key.pods {
        Some(pods) => pods.to_string(),
        None => "all pods".to_owned(),
    };
    if let Some((_, name)) = &key.port {
        words += &format!(", port {name}");
    }
    let end = (0..=COMMENT_MAX.min(words.len())).rev().find(|end| words.is_char_boundary(*end)).unwrap_or(0);
    words.truncate(end);
    words
}

/// 128 bits that stand for a content, the same in every run of the same build. Users write what is hashed, so they are so many
/// that two contents with the same ones can't be found. In 22 characters that `nft` reads in a name: the kernel reads all of each set's
/// name whenever it looks for a set.
pub(super) fn hash(content: &impl Hash) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, content).hash(&mut hasher);
        hasher.finish()
    };
    // Eleven digits of six bits hold 64 bits.
    let digits =
        |half: u64| (0..11).map(move |digit| char::from(DIGITS[(half >> (6 * digit)) as usize % 64]));
    digits(half(1)).chain(digits(half(2))).collect()
}
