//! The picture of one save and the training steps beside it, shown in the README.

use super::run::{Activity, Block, Part};
use crate::bench::report::charts::{AXIS, Drawn, Margins, WIDE, canvas, lanes, letters};
use crate::bench::report::ink::{self, Ink};
use ashore::{Error, ErrorKind, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use std::path::Path;

const LANES: [&str; 4] = ["training", "copy to the arena", "write to disk", "commit"];
const LANE: u32 = 64;
const KEY: u32 = 70;

/// Draws the block whose save took the median time to become durable.
///
/// # Errors
/// `NotFound` when no block has a save; `Io` of the file.
pub fn write(blocks: &[Block], path: &Path) -> Result<()> {
    let mut blocks: Vec<_> = blocks.iter().filter(|block| block.save.is_some()).collect();
    blocks.sort_by_key(|block| block.save.as_ref().map(|save| save.committed.durable));
    let Some(block) = blocks.get(blocks.len() / 2) else {
        return Err(Error::new(ErrorKind::NotFound, "no save to draw: train for more steps option=--picture"));
    };
    let svg = draw(block).map_err(|error| Error::new(ErrorKind::Internal, format!("the picture: {error}")))?;
    std::fs::write(path, svg).map_err(|error| Error::io("cannot write the picture", error).with_path(path))
}

fn draw(block: &Block) -> Drawn<String> {
    let seconds = |part: &Part| (part.from.as_secs_f64(), part.to.as_secs_f64());
    let mut bars: Vec<(usize, (f64, f64), Ink)> = Vec::new();
    for part in &block.parts {
        let ink = match part.activity {
            Activity::Compute => ink::GRID,
            Activity::Update => ink::LIMIT,
            Activity::Save | Activity::Fence => ink::CALL,
        };
        bars.push((0, seconds(part), ink));
    }
    if let Some(save) = &block.save {
        let (begin, committed) = (save.called.as_secs_f64(), &save.committed);
        let at = |after: std::time::Duration| begin + after.as_secs_f64();
        let written = at(committed.durable.saturating_sub(committed.tail));
        bars.push((1, (begin, at(committed.staged)), ink::STAGING));
        bars.push((2, (begin, written), ink::WRITING));
        bars.push((3, (written, at(committed.durable)), ink::COMMIT));
    }
    // Show the save and all of the step in which it becomes durable, but not the training after it.
    let durable = bars.iter().filter(|(lane, ..)| *lane > 0).map(|(_, (_, to), _)| *to).fold(0.0, f64::max);
    let mut updates = bars.iter().filter(|(lane, _, ink)| *lane == 0 && *ink == ink::LIMIT).map(|(_, (_, to), _)| *to);
    let end = updates.find(|to| *to >= durable).unwrap_or(durable);
    bars.retain(|(_, (from, _), _)| *from < end);
    let height = LANE * LANES.len() as u32;
    canvas(WIDE, height + AXIS + KEY, |area| {
        area.fill(&WHITE)?;
        let mut chart = lanes(area, WIDE, Margins { top: KEY, right: WIDE.right / 2 }, end, f64::from(height))?;
        let gap = end / 900.0;
        chart.draw_series(bars.iter().map(|(lane, (from, to), ink)| {
            let top = f64::from(LANE) * *lane as f64 + 10.0;
            // A bar that is too short to see is drawn as a sliver; a gap separates neighbours.
            let to = (to - gap).max(from + gap);
            Rectangle::new([(*from, top), (to, top + f64::from(LANE) - 20.0)], ink.rgb().filled())
        }))?;
        chart.draw_series(LANES.iter().enumerate().map(|(lane, name)| {
            let middle = f64::from(LANE) * (lane as f64 + 0.5);
            EmptyElement::at((0.0, middle)) + Text::new(*name, (-20, 0), letters(ink::TEXT, HPos::Right, VPos::Center))
        }))?;
        let key =
            [("forward and backward", ink::GRID), ("update", ink::LIMIT), ("blocked by save and fence", ink::CALL)];
        let mut x = WIDE.left as i32;
        for (name, ink) in key {
            area.draw(&Rectangle::new([(x, 22), (x + 28, 50)], ink.rgb().filled()))?;
            area.draw(&Text::new(name, (x + 40, 36), letters(ink::MUTED, HPos::Left, VPos::Center)))?;
            x += 100 + 15 * name.len() as i32;
        }
        Ok(())
    })
}
