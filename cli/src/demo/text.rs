//! The demo's training data: a text about a harbour, as numbers.

use crate::rng::Rng;

/// Written for this demo.
const TEXT: &str = include_str!("text.txt");

/// The text as indices into its alphabet.
pub struct Corpus {
    /// The distinct bytes of the text, sorted: the model's vocabulary.
    pub alphabet: Vec<u8>,
    tokens: Vec<usize>,
}

/// Examples for one step: `contexts` has `context` tokens for each of `targets`.
pub struct Batch {
    pub contexts: Vec<usize>,
    pub targets: Vec<usize>,
}

impl Corpus {
    pub fn new() -> Self {
        let mut alphabet = TEXT.as_bytes().to_vec();
        alphabet.sort_unstable();
        alphabet.dedup();
        let tokens = TEXT.bytes().map(|b| alphabet.partition_point(|&a| a < b)).collect();
        Self { alphabet, tokens }
    }

    /// Draws `batch` positions in the text: the tokens before each, and the token to predict.
    pub fn draw(&self, rng: &mut Rng, batch: usize, context: usize) -> Batch {
        let mut drawn = Batch { contexts: Vec::with_capacity(batch * context), targets: Vec::with_capacity(batch) };
        for _ in 0..batch {
            let start = rng.below(self.tokens.len() - context);
            drawn.contexts.extend_from_slice(&self.tokens[start..start + context]);
            drawn.targets.push(self.tokens[start + context]);
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_spell_the_text_again() {
        let corpus = Corpus::new();
        let spelled: Vec<u8> = corpus.tokens.iter().map(|&t| corpus.alphabet[t]).collect();
        assert_eq!(spelled, TEXT.as_bytes());
        assert!(TEXT.is_ascii() && TEXT.len() > 4000);
    }

    #[test]
    fn a_batch_is_text_followed_by_its_next_letter() {
        let corpus = Corpus::new();
        let drawn = corpus.draw(&mut Rng::new(3), 5, 9);
        for (context, &target) in drawn.contexts.chunks(9).zip(&drawn.targets) {
            let example = [context, &[target]].concat();
            assert!(corpus.tokens.windows(10).any(|w| w == example));
        }
    }
}
